"""What an export refuses before a run starts, and what a failed write leaves behind."""

from __future__ import annotations

import errno

import pytest
import torch
from torch import nn

from export_cases import site_names, small_llama, solve
from geoquant.errors import UserError
from geoquant.export import FORMATS, check, compressed_tensors, weights
from geoquant.export.adapter import export_adapter
from geoquant.export.compressed_tensors import export_compressed_tensors
from geoquant.export.dense import export_dense
from geoquant.lattice.grid import Grid
from geoquant.recipe import Recipe


def every_site(model, grid: Grid) -> dict[str, Grid]:
    return dict.fromkeys(site_names(model), grid)


def test_the_recipe_offers_exactly_these_formats():
    assert set(FORMATS) == set(Recipe.model_fields["formats"].annotation.__args__[0].__args__)
    assert len({format.folder for format in FORMATS.values()}) == len(FORMATS)


def test_unknown_format_gets_a_suggestion():
    with pytest.raises(UserError, match=r"unknown format 'compressed_tensor'.*mean 'compressed-tensors'"):
        check("compressed_tensor", nn.Module(), {})


def test_plain_grids_pass_without_notes():
    model = small_llama()
    for grid in (Grid(2, 32), Grid(4, 32), Grid(8, 32), Grid(4, 200), Grid(3, 32, symmetric=False)):
        assert check("dense", model, every_site(model, grid)) == ()
    assert check("compressed-tensors", model, every_site(model, Grid(4, 32))) == ()


def test_notes_say_what_the_file_costs():
    model = small_llama()
    assert check("compressed-tensors", model, every_site(model, Grid(3, 32))) == (
        "14 sites: 3-bit symmetric codes are stored in 4-bit words",
    )
    assert check("compressed-tensors", model, every_site(model, Grid(4, 64, symmetric=False))) == (
        "14 sites: 4-bit asymmetric codes are stored in 8-bit words",
        "2 sites: group size 64 does not divide 96 columns; written as groups of 32 with repeated scales",
    )
    assert check("compressed-tensors", model, every_site(model, Grid(4, 32)), keep=0.01) == (
        "kept columns go into a PEFT adapter: readers must load model and adapter together",
    )


def test_eight_asymmetric_bits_are_refused():
    model = small_llama()
    with pytest.raises(UserError, match=r"cannot hold 8-bit asymmetric codes.*--format dense"):
        check("compressed-tensors", model, every_site(model, Grid(8, 32, symmetric=False)))


def test_groups_without_a_useful_divisor_are_refused_with_one_that_works():
    model = small_llama()
    with pytest.raises(UserError, match=r"group size 50 does not divide the 64 columns.*--group-size 32 or"):
        check("compressed-tensors", model, every_site(model, Grid(4, 50)))
    assert check("compressed-tensors", model, every_site(model, Grid(4, 32))) == ()


def test_a_small_group_that_divides_is_the_users_choice():
    model = small_llama()
    assert check("compressed-tensors", model, every_site(model, Grid(4, 4))) == ()


def test_gpt2_is_refused_by_name():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32))
    with pytest.raises(UserError, match=r"torch\.nn\.Linear only; transformer\.h\.0\.attn\.c_attn is Conv1D"):
        check("compressed-tensors", model, {"transformer.h.0.attn.c_attn": Grid()})
    assert check("dense", model, {"transformer.h.0.attn.c_attn": Grid()}) == ()


def test_a_tied_head_is_refused_an_untied_one_is_not():
    grids = {"lm_head": Grid(4, 32)}
    with pytest.raises(UserError, match="lm_head shares its weight with the embedding"):
        check("compressed-tensors", small_llama(), grids)
    assert check("compressed-tensors", small_llama(tie_word_embeddings=False), grids) == ()


def test_kept_columns_without_peft_name_the_extra(monkeypatch):
    model = small_llama()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package 'peft'; run: pip install 'geoquant\[peft\]'"):
        check("compressed-tensors", model, every_site(model, Grid(4, 32)), keep=0.01)
    check("compressed-tensors", model, every_site(model, Grid(4, 32)), keep=0.01, verify=False)


def test_float16_overflow_names_the_tensor(tmp_path):
    model = small_llama()
    model.model.norm.weight.data[3] = 1e6
    with pytest.raises(UserError, match=r"model\.norm\.weight does not fit into float16"):
        export_dense(model, None, tmp_path / "dense", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def full_disk_after(successes: int, monkeypatch, module) -> None:
    """Let `module.save_file` work `successes` times, then fail half-way as on a full disk."""
    real, calls = module.save_file, []

    def save_file(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) > successes:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata=metadata)

    monkeypatch.setattr(module, "save_file", save_file)


@pytest.mark.parametrize("successes", [0, 3])
def test_full_disk_is_one_line_and_leaves_the_old_export_whole(tmp_path, monkeypatch, successes):
    model = small_llama()
    solutions = solve(model, lambda position: Grid(4, 32))
    out = tmp_path / "model"
    export_compressed_tensors(model, None, solutions, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    full_disk_after(successes, monkeypatch, weights)
    with pytest.raises(UserError, match=r"disk full while writing .*free some space"):
        export_compressed_tensors(model, None, solutions, out, max_shard_bytes=4096)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]


def test_full_disk_while_writing_dense_or_adapter(tmp_path, monkeypatch):
    from geoquant.export import adapter

    model = small_llama()
    solutions = solve(model, lambda position: Grid(4, 32), lambda name, columns: [1])
    full_disk_after(0, monkeypatch, weights)
    full_disk_after(0, monkeypatch, adapter)
    with pytest.raises(UserError, match="disk full"):
        export_dense(model, None, tmp_path / "dense")
    with pytest.raises(UserError, match="disk full"):
        export_adapter(solutions, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_export_leaves_nothing(tmp_path):
    model = small_llama()
    solutions = solve(model, lambda position: Grid(4, 32))

    def pairs():
        yield from list(solutions.items())[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_compressed_tensors(model, None, pairs(), tmp_path / "model", max_shard_bytes=4096)
    assert list(tmp_path.iterdir()) == []


def test_a_solution_of_another_shape_is_a_bug_not_a_file(tmp_path):
    model = small_llama()
    solutions = solve(model, lambda position: Grid(4, 32))
    first, *_, last = solutions
    with pytest.raises(ValueError, match="codes"):
        export_compressed_tensors(model, None, {first: solutions[last]}, tmp_path / "model")
    with pytest.raises(ValueError, match="no module 'nowhere'"):
        export_compressed_tensors(model, None, {"nowhere": solutions[first]}, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_broken_tie_is_noticed(tmp_path):
    model = small_llama()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1.0)
    with pytest.raises(ValueError, match=r"lm_head\.weight is declared tied to"):
        export_dense(model, None, tmp_path / "dense")


def test_offloaded_weights_are_refused(tmp_path):
    model = small_llama()
    model.model.norm.to("meta")
    with pytest.raises(UserError, match=r"model\.norm\.weight is not in memory"):
        export_dense(model, None, tmp_path / "dense")


def test_unknown_dtype(tmp_path):
    with pytest.raises(UserError, match=r"unknown export dtype; got torch\.int8"):
        export_dense(small_llama(), None, tmp_path / "dense", dtype=torch.int8)


def test_word_bits_cover_every_grid():
    got = {(b, s): compressed_tensors.word_bits(Grid(b, 32, s)) for b in range(2, 8) for s in (True, False)}
    assert got == {
        (2, True): 2,
        (2, False): 4,
        (3, True): 4,
        (3, False): 4,
        (4, True): 4,
        (4, False): 8,
        (5, True): 8,
        (5, False): 8,
        (6, True): 8,
        (6, False): 8,
        (7, True): 8,
        (7, False): 8,
    }
    assert compressed_tensors.word_bits(Grid(8, 32)) == 8
