"""The published sizes of RIFormer and the check of a custom one.

Source: RIFormer (CVPR 2023), arXiv 2304.05659, which keeps PoolFormer's five sizes; key names and layer-scale values
are those of mmpretrain's ``RIFormer.arch_settings``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["ARCHS", "Arch", "ArchLike", "resolve_arch"]


@dataclass(frozen=True)
class Arch:
    """What fixes the shape of a RIFormer: one entry per stage in each tuple.

    ``layers``: blocks; ``embed_dims``: channels; ``mlp_ratios``: hidden width is ``int(dim * ratio)``;
    ``layer_scale_init_value``: the constant that both layer scales start at (not a matter of shape).
    """

    layers: tuple[int, ...]
    embed_dims: tuple[int, ...]
    mlp_ratios: tuple[float, ...]
    layer_scale_init_value: float = 1e-5

    @property
    def hidden_dims(self) -> tuple[int, ...]:
        """Hidden width of the MLP of each stage."""
        return tuple(int(dim * ratio) for dim, ratio in zip(self.embed_dims, self.mlp_ratios, strict=True))

    @property
    def channels(self) -> tuple[int, ...]:
        """Output channels of each entry of ``RIFormer.network``.

        Stages and the downsamplings between them; as in mmpretrain there is no downsampling between two stages of the
        same width, so that list is shorter than ``2 * stages - 1`` then.
        """
        dims = [self.embed_dims[0]]
        for before, after in zip(self.embed_dims, self.embed_dims[1:], strict=False):
            dims += [after, after] if before != after else [after]
        return tuple(dims)

    @property
    def name(self) -> str | None:
        """The published name of this shape ("s12", ...), or None; the layer-scale start does not count."""
        return next((name for name, arch in ARCHS.items() if arch.same_shape(self)), None)

    def same_shape(self, other: Arch) -> bool:
        """Whether both have the same parameters, up to their values."""
        return (self.layers, self.embed_dims, self.hidden_dims) == (other.layers, other.embed_dims, other.hidden_dims)

    def as_dict(self) -> dict[str, Any]:
        """The same as a dict that mmpretrain's ``RIFormer(arch=...)`` takes."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


ArchLike = str | Mapping[str, Any] | Arch

_S, _M, _R = (64, 128, 320, 512), (96, 192, 384, 768), (4, 4, 4, 4)
ARCHS: dict[str, Arch] = {
    "s12": Arch((2, 2, 6, 2), _S, _R, 1e-5),
    "s24": Arch((4, 4, 12, 4), _S, _R, 1e-5),
    "s36": Arch((6, 6, 18, 6), _S, _R, 1e-6),
    "m36": Arch((6, 6, 18, 6), _M, _R, 1e-6),
    "m48": Arch((8, 8, 24, 8), _M, _R, 1e-6),
}

_KEYS = ("layers", "embed_dims", "mlp_ratios", "layer_scale_init_value")


def resolve_arch(arch: ArchLike) -> Arch:
    """Return the checked `Arch` for a published name (any case), a dict in mmpretrain's form, or an `Arch`.

    A dict needs ``layers`` and ``embed_dims``; ``mlp_ratios`` (default 4 everywhere) and ``layer_scale_init_value``
    (default 1e-5) may be left out.

    Raises:
        ValueError: unknown name, missing or unknown key, lengths that differ, a value outside its range.
        TypeError: neither a name, a dict nor an `Arch`, or an entry that is not a number.
    """
    if isinstance(arch, str):
        found = ARCHS.get(arch.strip().lower())
        if found is None:
            raise ValueError(
                f"unknown RIFormer arch {arch!r}; expected one of {', '.join(ARCHS)} (any case), "
                "or a dict with 'layers' and 'embed_dims' for another size"
            )
        return found
    if isinstance(arch, Arch):
        arch = arch.as_dict()
    if not isinstance(arch, Mapping):
        raise TypeError(
            f"arch must be one of {', '.join(ARCHS)}, or a dict with 'layers' and 'embed_dims'; "
            f"found {type(arch).__name__}"
        )
    unknown = [key for key in arch if key not in _KEYS]
    missing = [key for key in _KEYS[:2] if key not in arch]
    if unknown or missing:
        raise ValueError(
            f"arch dict has keys {list(arch)}"
            + (f"; missing {missing}" if missing else "")
            + (f"; unknown {unknown}" if unknown else "")
            + "; expected 'layers' and 'embed_dims', optionally 'mlp_ratios' and 'layer_scale_init_value'"
        )
    layers = _numbers("layers", arch["layers"], int)
    embed_dims = _numbers("embed_dims", arch["embed_dims"], int)
    mlp_ratios = _numbers("mlp_ratios", arch.get("mlp_ratios", [4] * len(layers)), float)
    if not len(layers) == len(embed_dims) == len(mlp_ratios):
        raise ValueError(
            "arch needs one entry per stage in each list; found "
            f"{len(layers)} layers, {len(embed_dims)} embed_dims, {len(mlp_ratios)} mlp_ratios"
        )
    scale = _numbers("layer_scale_init_value", [arch.get("layer_scale_init_value", 1e-5)], float, positive=False)[0]
    result = Arch(layers, embed_dims, mlp_ratios, scale)
    if min(result.hidden_dims) < 1:
        raise ValueError(f"arch has an MLP without hidden channels: int(dim * ratio) is {result.hidden_dims}")
    return result


def _numbers(key: str, values: Any, kind: type, positive: bool = True) -> tuple[Any, ...]:
    allowed = int if kind is int else (int, float)
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) == 0:
        raise TypeError(f"arch[{key!r}] must be a non-empty list of {kind.__name__}, one per stage; found {values!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, allowed):
            raise TypeError(f"arch[{key!r}] must hold {kind.__name__} values; found {value!r} in {list(values)!r}")
        if positive and not value > 0:
            raise ValueError(f"arch[{key!r}] must be positive; found {value!r} in {list(values)!r}")
    return tuple(values)
