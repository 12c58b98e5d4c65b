"""Can members be told from non-members without the model? Then no attack on the model means anything.

A blind baseline sees texts only. Three classifiers, whose scores are made out of fold:

    words   ridge on the presence of words, punctuation marks and neighbouring pairs of them
    word    the one of these that divides the other folds best, by itself: a mark that one side bears
    sizes   ridge on lengths, bytes under zlib, shares of digits, capitals, punctuation and letters beyond ASCII

The best one's AUC is the result. Out-of-fold scores are not independent of each other (each fold's model has seen
the other folds), so the test is by permutation: sides are dealt out at random, everything after the features is done
again, and p is the share of deals that do at least as well. Where records were dealt to the two sides at random this
is exact: the false alarm rate is `LEVEL`, whatever the classifiers, their number, and the sizes of the sides.

Records that are dealt out in groups (all of one author's on one side) are not exchangeable, and the baseline rightly
says so: the intervals of the attacks take records as independent too. Texts that occur twice on one side count once.

Das, Zhang, Tramer: Blind Baselines Beat Membership Inference Attacks for Foundation Models (arXiv:2406.16201);
Ojala, Garriga: Permutation Tests for Studying Classifier Performance, JMLR 2010.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.linalg import cho_factor, cho_solve, qr
from scipy.stats import rankdata
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.preprocessing import normalize

from geoquant.data.records import Record
from geoquant.privacy.delong import delong_interval

__all__ = ["LEVEL", "BlindResult", "best_word", "blind_test", "out_of_fold"]

LEVEL = 0.01  # one clean split in a hundred is refused
DEALS = 999
FOLDS = 5
WORDS = 1024  # words and pairs that are read: those whose presence varies most over all records
MOST = 4000  # records of a side that are looked at, drawn at random: seconds, and enough to see an AUC of 0.53
TOKEN = r"\w+|[^\w\s]"


@dataclass(frozen=True)
class BlindResult:
    """How well texts alone tell the sides apart.

    auc, ci: of the best classifier, named by `view`, out of fold; the interval is DeLong's, which takes the folds'
    scores as independent. The best of three is a little over 0.5 on a clean split: judge by p and alarm.
    p: of "the records were dealt to the two sides at random", one-sided, by permutation.
    alarm: the smallest AUC that would have been an alarm here; a difference that reaches less goes unnoticed.
    """

    auc: float
    ci: tuple[float, float]
    p: float
    alarm: float
    view: str
    n_members: int
    n_nonmembers: int
    level: float = LEVEL

    @property
    def valid(self) -> bool:
        """Whether the split may be used to judge a model."""
        return self.p > self.level

    def to_dict(self) -> dict:
        """The `gate` of report.json."""
        return {
            "valid": self.valid,
            "auc": self.auc,
            "ci": list(self.ci),
            "p": self.p,
            "level": self.level,
            "alarm": self.alarm,
            "view": self.view,
            "n_members": self.n_members,
            "n_nonmembers": self.n_nonmembers,
        }


def blind_test(members: Sequence[Record], nonmembers: Sequence[Record], *, seed: int = 0) -> BlindResult:
    """Test whether the two sides look as if they had been dealt out at random. A few seconds at 4000 + 4000 records."""
    rng = np.random.default_rng(seed)
    inside, outside = (_distinct(side, rng) for side in (members, nonmembers))
    texts, count = [*inside, *outside], len(inside)
    side = np.where(np.arange(len(texts)) < count, 1.0, 0.0)
    # Column 0 is the split as given; centring by the share of members, which every deal has, leaves no intercept to
    # learn, and so none that betrays what the held-out fold must hold.
    deals = np.column_stack([side, *(rng.permutation(side) for _ in range(DEALS))])
    folds = rng.permutation(np.arange(len(texts)) % min(FOLDS, len(texts)))
    targets, present = deals - side.mean(), _present(texts)
    scores = {
        "words": out_of_fold(_scaled(normalize(present)), targets, folds),
        "word": best_word(present, targets, folds),
        "sizes": out_of_fold(_scaled(_sizes(texts)), targets, folds),
    }
    reached = {name: _aucs(table, deals) for name, table in scores.items()}
    best = np.max(list(reached.values()), axis=0)
    view = max(reached, key=lambda name: reached[name][0])
    own = scores[view][:, 0]
    return BlindResult(
        auc=float(best[0]),
        ci=delong_interval(own[:count], own[count:]),
        p=float((best >= best[0] - 1e-9).mean()),
        alarm=float(np.quantile(best, 1 - LEVEL, method="higher")),
        view=view,
        n_members=count,
        n_nonmembers=len(outside),
    )


def _distinct(records: Sequence[Record], rng: np.random.Generator) -> list[str]:
    """The different texts of one side, at most MOST of them."""
    texts = list(dict.fromkeys(record.text.strip() for record in records))
    chosen = np.sort(rng.permutation(len(texts))[:MOST])
    return [texts[index] for index in chosen]


def out_of_fold(
    view: Float[np.ndarray, "n d"], targets: Float[np.ndarray, "n k"], folds: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n k"]:
    """Ridge predictions of each column of `targets` for the records of every fold from those of all other folds.

    One factorisation per fold serves all columns. The penalty is 1, rows have a mean squared norm of 1.
    """
    if view.shape[1] > len(view):  # turned into as many columns as there are records, which changes no prediction
        view = qr(view.T, mode="r")[0][: len(view)].T
    out = np.empty_like(targets)
    gram, moment = view.T @ view, view.T @ targets
    for fold in np.unique(folds):
        held = view[folds == fold]
        factor = cho_factor(gram - held.T @ held + np.eye(view.shape[1], dtype=view.dtype))
        out[folds == fold] = held @ cho_solve(factor, moment - held.T @ targets[folds == fold])
    return out


def best_word(
    present: Float[np.ndarray, "n d"], targets: Float[np.ndarray, "n k"], folds: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n k"]:
    """For each fold and column of `targets` the presence of the word most correlated with it in all other folds."""
    out = np.empty_like(targets)
    for fold in np.unique(folds):
        held, rest = present[folds == fold], present[folds != fold]
        spread = rest.std(axis=0)
        centred = (rest - rest.mean(axis=0)) / np.where(spread > 0, spread, np.inf)
        moment = centred.T @ targets[folds != fold]
        word = np.abs(moment).argmax(axis=0)
        out[folds == fold] = held[:, word] * np.sign(moment[word, np.arange(len(word))])
    return out


def _aucs(scores: Float[np.ndarray, "n k"], sides: Float[np.ndarray, "n k"]) -> Float[np.ndarray, " k"]:
    """The AUC of each column of scores for the sides in the same column."""
    count = sides[:, 0].sum()
    # Ties by rounding: equal features give equal predictions but for their last bits.
    ranks = rankdata(np.round(scores, 9), axis=0)
    return ((ranks * sides).sum(axis=0) - count * (count + 1) / 2) / (count * (len(sides) - count))


def _present(texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
    """Presence (0 or 1) of the words and pairs that divide the records most evenly, whichever side they are on."""
    table = CountVectorizer(token_pattern=TOKEN, ngram_range=(1, 2), binary=True).fit_transform(texts).tocsc()
    share = np.diff(table.indptr) / len(texts)
    chosen = np.argsort(-share * (1 - share), kind="stable")[:WORDS]
    return table[:, chosen].toarray().astype(np.float64)


def _sizes(texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
    """Lengths and shares of kinds of characters, each with its square: spread tells sides apart as location does."""
    rows = []
    for text in texts:
        length, packed = len(text), len(zlib.compress(text.encode()))
        kinds = [
            sum(map(str.isdigit, text)),
            sum(map(str.isupper, text)),
            len(re.findall(r"[^\w\s]", text)),
            sum(letter > "\x7f" for letter in text),
            text.count("\n"),
        ]
        words = len(text.split())
        rows.append([np.log1p(length), np.log1p(packed), packed / (length + 1), words / (length + 1)])
        rows[-1] += [kind / (length + 1) for kind in kinds]
    table = np.array(rows)
    table = (table - table.mean(axis=0)) / np.maximum(table.std(axis=0), 1e-12)
    table = table.clip(-4, 4)
    return np.hstack([table, table**2])


def _scaled(table: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Columns centred, rows of mean squared norm 1."""
    table = table - table.mean(axis=0)
    size = np.sqrt((table**2).sum() / len(table))
    return table / size if size > 0 else table
