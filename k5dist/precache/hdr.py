"""HDR pictures (PQ or HLG) as SDR ones, by the broadcasters' own formulas, in numpy.

The display's light is computed from the signal, its range compressed channel by channel, its colours taken from
BT.2020 to BT.709, and the result encoded for an SDR display:

- PQ: the EOTF of SMPTE ST 2084 = BT.2100 table 4, up to 10,000 cd/m².
- HLG: the inverse OETF and the OOTF of BT.2100 table 5, for a display of 1,000 cd/m² (system gamma 1.2).
- Range: the EETF of Report BT.2390-10 section 5.4.1 (a Hermite roll-off in the PQ domain) from 1,000 cd/m² to
  203 cd/m², which is the diffuse white of HDR in Report BT.2408-7. Below 88 cd/m² it leaves light as it is, so a grey
  card (26 cd/m²) keeps its light, and diffuse white becomes 90% of SDR's signal, with room for highlights above.
- Colour: the matrix of Report BT.2407-0 section 2, out-of-gamut colours clipped.
- SDR: the inverse of the EOTF of BT.1886 (gamma 2.4, black 0, white 203 cd/m²).

The curve depends on nothing but the signal: mastering metadata is often wrong, and a curve that follows the picture
would make clips flicker. What is brighter than 1,000 cd/m² is white.
"""

from functools import cache

import numpy as np
from av.video.reformatter import ColorPrimaries, ColorTrc

TRANSFERS = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)

PEAK = 1000.0  # cd/m²: where HDR is taken to end, and HLG's nominal display
WHITE = 203.0  # cd/m²: the light of SDR's white

_CODES = 1 << 16
_STEPS = 1 << 20  # of linear light: the first one is a third of an 8-bit step after the gamma

# ST 2084's constants.
_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32

_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)  # of BT.2020
_TO_709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)  # rows sum to 1 within a rounding: neutral stays neutral
_TO_709 /= _TO_709.sum(1, keepdims=True)


def tone_map(rgb: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """Map full-range 16-bit R'G'B' [H, W, 3] of an HDR transfer (one of TRANSFERS) to uint8 SDR R'G'B' [H, W, 3].

    primaries is FFmpeg's number for the picture's; all but BT.709 are taken for BT.2020, as BT.2100 has them.
    """
    if transfer == ColorTrc.SMPTE2084:
        light = _pq_table().take(rgb)
    else:
        scene = _hlg_table().take(rgb)
        light = scene * np.power(scene @ _LUMINANCE, np.float32(0.2))[..., None]
        light = _roll_off_table().take(_indices(light))
    if primaries != ColorPrimaries.BT709:
        light = light @ _TO_709.T
    return _signal_table().take(_indices(light))


def _indices(light: np.ndarray) -> np.ndarray:
    """Light 0 … 1 (what lies outside is clipped) as int32 indices of a table of _STEPS entries."""
    scaled = light * np.float32(_STEPS - 1)
    scaled += np.float32(0.5)
    return np.clip(scaled, 0, _STEPS - 1, out=scaled).astype(np.int32)


def pq_light(signal: np.ndarray) -> np.ndarray:
    """ST 2084's EOTF: signal 0 … 1 to cd/m²."""
    power = np.asarray(signal, np.float64) ** (1 / _M2)
    return 10000 * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1)


def pq_signal(light: np.ndarray) -> np.ndarray:
    """ST 2084's inverse EOTF: cd/m² to signal 0 … 1."""
    power = (np.asarray(light, np.float64) / 10000) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2


def roll_off(light: np.ndarray) -> np.ndarray:
    """BT.2390's EETF: light of up to PEAK (more is clipped) as light of up to WHITE, both in cd/m²; black is 0."""
    peak = pq_signal(np.array(PEAK))
    signal, limit = np.minimum(pq_signal(light) / peak, 1), pq_signal(np.array(WHITE)) / peak
    knee = 1.5 * limit - 0.5
    t = np.maximum(signal - knee, 0) / (1 - knee)
    curve = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * limit
    return pq_light(np.where(signal < knee, signal, curve) * peak)


@cache
def _pq_table() -> np.ndarray:
    """PQ signal in 16 bits → rolled-off light, 1 being WHITE; float32 [65536]."""
    return (roll_off(pq_light(np.arange(_CODES) / (_CODES - 1))) / WHITE).astype(np.float32)


@cache
def _hlg_table() -> np.ndarray:
    """HLG signal in 16 bits → the scene's light 0 … 1; float32 [65536]."""
    signal = np.arange(_CODES) / (_CODES - 1)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12).astype(np.float32)


@cache
def _roll_off_table() -> np.ndarray:
    """Light 0 … 1 of PEAK → rolled-off light, 1 being WHITE; float32 [_STEPS]."""
    return (roll_off(np.linspace(0, PEAK, _STEPS)) / WHITE).astype(np.float32)


@cache
def _signal_table() -> np.ndarray:
    """Light 0 … 1 of WHITE → SDR signal; uint8 [_STEPS]."""
    return np.round(255 * np.linspace(0, 1, _STEPS) ** (1 / 2.4)).astype(np.uint8)
