"""Compute statistics of a LeRobot dataset, per episode and aggregated, as lerobot defines them.

Statistics are {name: float64 [C]}, with one column per vector dimension and per camera channel. `count` is the number
of frames that contribute to a column.
"""

from collections.abc import Iterable, Iterator

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
NAMES = ("min", "max", "mean", "std", "count", *QUANTILES)

Stats = dict[str, np.ndarray]


def vector_stats(values: np.ndarray) -> Stats:
    """Compute the statistics of an episode's vectors, ignoring values that are not finite.

    Quantiles are order statistics (NumPy's "inverted_cdf"), which lerobot approximates with a histogram of 5000 bins.

    Args:
        values: float64 [T, C].

    Returns:
        Statistics [C]; a column without finite values has count 0 and NaN elsewhere.
    """
    finite = np.isfinite(values)
    count = finite.sum(axis=0)
    divisor = np.where(count, count, np.nan)
    ascending = np.sort(np.where(finite, values, np.nan), axis=0)  # NaN sorts last
    mean = np.where(finite, values, 0).sum(axis=0) / divisor
    deviation = np.where(finite, values, mean) - mean

    def at(rank: np.ndarray) -> np.ndarray:
        return np.take_along_axis(ascending, rank[None], axis=0)[0]

    return {
        "min": ascending[0],
        "max": at(np.maximum(count - 1, 0)),
        "mean": mean,
        "std": np.sqrt((deviation**2).sum(axis=0) / divisor),
        "count": count.astype(np.float64),
    } | {name: at(_rank(q, count)) for name, q in QUANTILES.items()}


class PixelStats:
    """Pixel statistics of one camera in one episode, in [0, 1], over the frames and pixels that lerobot samples.

    `std` is exact, unlike that of lerobot before 0.6, which squares pixels in uint8 and overflows.
    """

    def __init__(self, length: int, height: int, width: int):
        """Choose the frames and pixels to sample.

        Args:
            length: T, number of frames in the episode.
            height: H, height of the frames in pixels.
            width: W, width of the frames in pixels.
        """
        self.count = max(min(length, 100), min(int(length**0.75), 10_000))
        self.frames = set(np.round(np.linspace(0, length - 1, self.count)).astype(int).tolist())
        self.stride = max(height, width) // 150 if max(height, width) >= 300 else 1
        self.histogram = np.zeros((3, 256), np.int64)

    def observe(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield an episode's frames unchanged, uint8 [H, W, 3] each, while accumulating the sampled pixels."""
        for number, frame in enumerate(frames):
            if number in self.frames:
                sample = frame[:: self.stride, :: self.stride]
                for channel, counts in enumerate(self.histogram):
                    counts += np.bincount(sample[..., channel].ravel(), minlength=256)
            yield frame

    def stats(self) -> Stats:
        """Return the statistics, with one column per channel."""
        levels = np.arange(256) / 255
        pixels = self.histogram.sum(axis=1)
        cumulative = self.histogram.cumsum(axis=1)
        mean = self.histogram @ levels / pixels
        variance = (self.histogram * (levels - mean[:, None]) ** 2).sum(axis=1) / pixels

        def at(rank: np.ndarray) -> np.ndarray:
            return levels[(cumulative <= rank[:, None]).sum(axis=1)]

        return {
            "min": at(np.zeros_like(pixels)),
            "max": at(pixels - 1),
            "mean": mean,
            "std": np.sqrt(variance),
            "count": np.full(3, float(self.count)),
        } | {name: at(_rank(q, pixels)) for name, q in QUANTILES.items()}


def concatenate(parts: list[Stats]) -> Stats:
    """Concatenate several statistics along their columns."""
    return {name: np.concatenate([part[name] for part in parts]) for name in NAMES}


def merge(a: Stats, b: Stats) -> Stats:
    """Aggregate the statistics of two sets of episodes, weighted by count.

    As in lerobot, an aggregated quantile is the weighted mean of the episodes' quantiles.
    """
    count = a["count"] + b["count"]
    divisor = np.where(count, count, np.nan)

    def weighted_mean(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        # Columns with count 0 are NaN and must not propagate into the sum.
        return (np.nan_to_num(x) * a["count"] + np.nan_to_num(y) * b["count"]) / divisor

    mean = weighted_mean(a["mean"], b["mean"])
    variance = weighted_mean(a["std"] ** 2 + (a["mean"] - mean) ** 2, b["std"] ** 2 + (b["mean"] - mean) ** 2)
    return {
        "min": np.fmin(a["min"], b["min"]),
        "max": np.fmax(a["max"], b["max"]),
        "mean": mean,
        "std": np.sqrt(variance),
        "count": count,
    } | {name: weighted_mean(a[name], b[name]) for name in QUANTILES}


def _rank(quantile: float, count: np.ndarray) -> np.ndarray:
    """Return the index of a quantile among `count` values sorted in ascending order."""
    return np.maximum(np.ceil(quantile * count).astype(int) - 1, 0)
