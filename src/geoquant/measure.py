"""Quality and leakage of one model state, measured the same way before and after quantization."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

from geoquant.data.records import Split
from geoquant.data.text import Windows, builtin_text, read_text, windows
from geoquant.errors import UserError
from geoquant.evaluate import divergence
from geoquant.evaluate.divergence import Divergence
from geoquant.evaluate.perplexity import Perplexity
from geoquant.model.load import load
from geoquant.privacy.scores import SplitScores, load_scores, save_scores
from geoquant.privacy.scoring import score_split
from geoquant.progress import Progress
from geoquant.recipe import Recipe
from geoquant.runs import atomic_write, read_json, write_json

__all__ = [
    "Quality",
    "Texts",
    "builtin_tail",
    "doubts",
    "measure_original",
    "measure_quantized",
    "prepare_texts",
    "score_model",
    "score_reference",
    "take_over",
]

# What a run finds out of its original and of the public base: the same for every run of them on the same texts.
OF_THE_ORIGINAL = (
    "original.json",
    "original_states.safetensors",
    "original_scores.safetensors",
    "base_scores.safetensors",
)

BUILTIN = "pydoc_data.topics (the Python language reference)"


@dataclass(frozen=True)
class Texts:
    """Calibration and evaluation windows; they never share a token."""

    calibration: Windows
    evaluation: Windows


def prepare_texts(tokenizer, recipe: Recipe) -> Texts:
    """Cut both texts by the windows protocol.

    Calibration takes the first windows of its text. Evaluation takes the first windows of another text, the
    windows after the calibration's of the same file, or, of the built-in text, its last ones.
    """
    if recipe.calibration is None and recipe.evaluation is None:
        return Texts(*builtin_ends(tokenizer, recipe.window, recipe.windows, recipe.evaluation_windows))
    source = recipe.calibration or BUILTIN
    text = read_text(recipe.calibration) if recipe.calibration else builtin_text()
    calibration = windows(tokenizer, text, length=recipe.window, count=recipe.windows, source=source)
    if recipe.evaluation is None:
        return Texts(calibration, builtin_tail(tokenizer, recipe.window, recipe.evaluation_windows))
    same = recipe.calibration and Path(recipe.calibration).resolve() == Path(recipe.evaluation).resolve()
    evaluation = windows(
        tokenizer,
        read_text(recipe.evaluation),
        length=recipe.window,
        count=recipe.evaluation_windows,
        source=recipe.evaluation,
        skip=recipe.windows if same else 0,
    )
    return Texts(calibration, evaluation)


def builtin_tail(tokenizer, length: int, count: int) -> Windows:
    """The last `count` windows of the built-in text."""
    return builtin_ends(tokenizer, length, 0, count)[1]


def builtin_ends(tokenizer, length: int, first: int, last: int) -> tuple[Windows, Windows]:
    """The `first` and the `last` windows of the built-in text: the whole of it takes seconds, so once for both."""
    whole = windows(tokenizer, builtin_text(), length=length, source=BUILTIN)
    if len(whole) < first + last:
        raise UserError(
            f"the built-in text has {len(whole)} windows of {length} tokens",
            wanted=f"{first} to calibrate and {last} to evaluate",
            fix="give --text FILE, or fewer windows",
        )
    return replace(whole, tokens=whole.tokens[:first]), replace(whole, tokens=whole.tokens[len(whole) - last :])


@dataclass(frozen=True)
class Quality:
    """Perplexity of one model state; of a quantized one also its divergence from the original."""

    perplexity: Perplexity
    divergence: Divergence | None = None


def measure_original(run: Path, model: nn.Module, text: Windows, progress: Progress) -> Quality:
    """Perplexity of the original, and its final states on disk for the divergence later; measured once per run."""
    path, states_path = run / "original.json", run / "original_states.safetensors"
    if path.exists() and states_path.exists():
        return Quality(_perplexity(read_json(path)))
    result, states = divergence.measure_original(model, text, progress=progress, phase="perplexity (original)")
    _check_finite(result, "the model", "check it with `geoquant eval` on another text")
    divergence.save_states(states_path, states, text)
    write_json(path, result.to_dict())
    return Quality(result)


def measure_quantized(
    run: Path,
    model: nn.Module,
    text: Windows,
    progress: Progress,
    original_head: Float[Tensor, "vocab hidden"] | None = None,
) -> Quality:
    """Perplexity of the quantized model and its divergence from the original, remembered in the run folder.

    original_head: the original's vocabulary projection where it was quantized too.
    """
    path = run / "quantized.json"
    if path.exists():
        kept = read_json(path)
        found = Divergence(**{**kept["divergence"], "windows": tuple(kept["divergence"]["windows"])})
        return Quality(_perplexity(kept["perplexity"]), found)
    states = divergence.load_states(run / "original_states.safetensors", text)
    result, found = divergence.measure(
        model, text, states, original_head, progress=progress, phase="perplexity (quantized)"
    )
    _check_finite(result, "the quantized model", "use more bits, a larger --damping, or --metric clipped")
    write_json(path, {"perplexity": result.to_dict(), "divergence": asdict(found)})
    return Quality(result, found)


def take_over(known: Path | None, run: Path) -> None:
    """Use what another run measured of the same original and base, on the same texts and records; nothing is written
    to it. The caller answers for their being the same.
    """
    for name in OF_THE_ORIGINAL if known else ():
        if (known / name).exists() and not (run / name).exists():
            atomic_write(run / name, lambda partial, name=name: shutil.copyfile(known / name, partial) and None)


def doubts(before: Quality, vocabulary: int) -> tuple[str, ...]:
    """A warning where the original predicts the text far worse than somebody who guesses among `vocabulary` tokens; one
    that was never trained is a little worse.
    """
    found = before.perplexity.perplexity
    if found <= 2 * vocabulary:
        return ()
    return (
        f"the original itself predicts the text worse than guessing: perplexity {found:.3g} with {vocabulary} tokens; "
        "is it the right tokenizer, text and model?",
    )


def _check_finite(result: Perplexity, subject: str, fix: str) -> None:
    if not math.isfinite(result.nll):
        raise UserError(f"{subject} gives no finite likelihood (NaN)", fix=fix)


def _perplexity(kept: dict) -> Perplexity:
    return Perplexity(**{**kept, "windows": tuple(kept["windows"])})


def score_model(path: Path, model: nn.Module, tokenizer, split: Split, progress: Progress, phase: str) -> SplitScores:
    """Per-token statistics of every record, remembered in `path`."""
    if path.exists():
        return load_scores(path, split)

    def named(_: str, done: int, total: int, note: str = "") -> None:
        progress(phase, done, total, note)

    scores = score_split(model, tokenizer, split, progress=named)
    save_scores(path, scores, split)
    return scores


def score_reference(path: Path, spec: str, split: Split, device: str, progress: Progress) -> SplitScores:
    """Scores of the public base; it is loaded, read and dropped before the model itself comes into memory."""
    if path.exists():
        return load_scores(path, split)
    loaded = load(spec, device=device)
    return score_model(path, loaded.model, loaded.tokenizer, split, progress, "scores of the base")
