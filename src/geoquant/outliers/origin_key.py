"""What every number of origins.json is, and in which unit: the key that the file carries.

By path: a dot enters an object, `[]` any element of a list. Rows of `[]` are blocks, sites or windows, as said there.
"""

from __future__ import annotations

__all__ = ["KEY"]

_HEADS = "by block, then by query head; null for a block whose attention was not seen"
_EFFECT = {
    "delta": ("rise of the mean loss of the windows", "nats per token"),
    "error": ("its standard error over windows; null for one window", "nats per token"),
    "windows[]": ("the rise, by window", "nats per token"),
}
_SPLIT = {
    "site": ("the matrix (curves: `normal weights` for the null)", "name"),
    "kind": ("attention or mlp, in or out (curves: `null` for the null)", "name"),
    "size": ("neighbouring columns of a row that share a scale; null: the whole row", "columns"),
    "best": ("clip of the least error, the same for every group of weights", "of the largest weight"),
    "best_weighted": ("the same with errors weighted by the energy of their inputs", "of the largest weight"),
    "error": ("least error: squares, over those of the weights", "share"),
    "unclipped": ("the same without a clip", "share"),
    "beyond": ("weights that the best clip cuts", "share"),
    "share": ("part of the least error that comes from cutting", "share"),
}
_TAILS = {
    "count": ("how many inputs were seen", "numbers"),
    "kurtosis": ("excess kurtosis of the inputs; 0 for normal numbers", "no unit"),
    "beyond_sigma": ("inputs beyond 6 standard deviations of their mean", "share"),
    "beyond_median": ("inputs beyond 20 medians of their size", "share"),
    "hill": ("tail index of their size by Hill; moments of that order do not exist", "no unit"),
    "hill_se": ("its standard error", "no unit"),
    "largest": ("largest size", "input"),
    "peak": ("largest size over the median; null where half of them are zero", "ratio"),
    "effective_bits": ("entropy of the codes of a symmetric 8-bit grid that reaches the largest", "bits"),
}
_RATIO = {
    "site": ("the matrix; null: all of the block", "name"),
    "block": ("of which block", "index"),
    "kind": ("attention or mlp, in or out; `block` for all of one", "name"),
    "ratio": ("weights whose |W_ij| ||x_j|| exceeds `means` times the mean of all (OWL)", "share"),
    "null": ("the same of normal weights on the same inputs", "share"),
    "tails": ("of the inputs; null for a block, and where inputs are not finite", "see below"),
}


def _under(path: str, entries: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    return {f"{path}.{name}": told for name, told in entries.items()}


_TOLD = {
    "sinks.positions[]": ("by window: the key of its first half that gets most attention, the sink", "position"),
    "sinks.uniform[]": ("by block: the null of mass, if queries treated all visible keys alike", "share"),
    "sinks.mass[][]": (f"attention that rests on the sink; {_HEADS}", "share"),
    "sinks.value_ratio[][]": (f"norm of the sink's value over the mean norm of the other keys'; {_HEADS}", "ratio"),
    "sinks.value_low[][]": (f"null of value_ratio: its 5% quantile over the other keys; {_HEADS}", "ratio"),
    "sinks.logit_range[][]": (f"mean over queries of the largest less the smallest logit; {_HEADS}", "nats"),
    "sinks.gaussian_range[][]": (f"null of logit_range: of normal logits of the same spread; {_HEADS}", "nats"),
    **_under(
        "norms.norms[]",
        {
            "name": ("the norm", "name"),
            "block": ("of which block", "index"),
            "channels": ("how many it has", "channels"),
            "amplification": ("max over median of the channels after its gain, over that before it", "ratio"),
            "shuffled": ("null: median of the same with the gains in a random order", "ratio"),
            "p": ("share of random orders that amplify as much", "probability"),
            "spearman": (
                "rank correlation of |gain| with the amplitude before it; null: gains are alike",
                "no unit",
            ),
            "error": ("standard error of that where the two know nothing of each other", "no unit"),
        },
    ),
    "residuals.largest[]": ("by boundary, before block 0 and after each: largest number of the stream", "hidden"),
    "residuals.typical[]": ("by boundary: median size of its numbers", "hidden"),
    "residuals.position[]": ("by boundary: where the largest stands", "position"),
    "residuals.dimension[]": ("by boundary: in which dimension", "index"),
    **_under(
        "residuals.lives[]",
        {
            "dimension": ("that is massive: `threshold` times the median or more", "index"),
            "born": ("block after which it first is; -1: the embeddings", "index"),
            "died": ("block after which it is no more; null: never", "index"),
            "peak": ("its largest size", "hidden"),
            "ratio": ("that over the median there", "ratio"),
            "block": ("after which block", "index"),
            "position": ("where in its windows, most often", "position"),
            "windows": ("windows in which it is massive at its peak", "share"),
            "lasted": ("boundaries from its birth to the end at which it is massive", "share"),
            "kept": ("its size where it was last massive, over its peak", "share"),
        },
    ),
    "residuals.massive_cosine[]": ("by block: median cosine of output and input, at massive positions", "cosine"),
    "residuals.ordinary_cosine[]": ("by block: the same at all other positions", "cosine"),
    "residuals.gaussian": ("null of largest over typical: of as many normal numbers", "ratio"),
    "residuals.threshold": ("of the median, from which on a number is massive", "ratio"),
    **_under(
        "super_weights.found[]",
        {
            "block": ("where a massive activation is born", "index"),
            "dimension": ("in which dimension", "index"),
            "window": ("in which window", "index"),
            "position": ("at which token", "position"),
            "site": ("matrix of the weight behind it", "name"),
            "row": ("of the weight", "index"),
            "column": ("of the weight", "index"),
            "weight": ("the weight", "weight"),
            "input": ("what it is multiplied with", "input"),
            "share": ("their product, of what the site writes there", "share"),
            "removed": ("of the activation after the block: what is gone without the weight", "share"),
            "rank": ("place of its size in its matrix, the largest is 1", "place"),
            "many": ("random weights zeroed at once for `random`", "weights"),
            "confirmed": ("whether zeroing it does more than all its nulls, beyond two standard errors", "yes or no"),
            **_under("zeroing", _EFFECT),
            **_under("like_sized[]", _EFFECT),
            **_under("random", _EFFECT),
        },
    ),
    "clipping.bits": ("of the codes whose scales are clipped", "bits"),
    **_under("clipping.sites[]", _SPLIT | {"gain": ("what the best clip saves of the error without one", "share")}),
    **_under(
        "clipping.curves[]",
        _SPLIT
        | {
            "clip[]": ("clips that were tried", "of the largest weight"),
            "clipped[]": ("by clip: error of the weights that are cut, relative squares", "share"),
            "rounded[]": ("by clip: error of the others", "share"),
        },
    ),
    "outliers.means": ("multiple of the mean from which a weight is an outlier", "ratio"),
    "outliers.normal_tails.beyond_sigma": ("null of beyond_sigma", "share"),
    "outliers.normal_tails.beyond_median": ("null of beyond_median", "share"),
    **_under("outliers.sites[]", _RATIO),
    **_under("outliers.sites[].tails", _TAILS),
    **_under("outliers.blocks[]", _RATIO),
    "findings[]": ("sentences computed from the numbers", "text"),
    "notes[]": ("what could not be found, and why", "text"),
    "windows": ("of public text that were read", "windows"),
    "length": ("of each", "tokens"),
}

KEY = {path: {"what": what, "unit": unit} for path, (what, unit) in _TOLD.items()}
