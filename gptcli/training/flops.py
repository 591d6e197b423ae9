"""How much arithmetic training takes, and how much a GPU could do: model FLOPs utilisation.

The count is that of Chowdhery et al. 2022 (PaLM), appendix B: 6 N + 12 L H D T operations per token
for N parameters that are in products, L blocks of H heads of width D, and windows of T tokens.
Peaks are the makers' figures for dense tensor products. Knows no terminal.
"""

from gptcli.config.model import ModelConfig

_TERA = 1e12
# By a part of the device's name, the first that fits: bfloat16 and float16, float32 (by TF32
# where there is TF32, for torch multiplies float32 in it). From the makers' data sheets.
_PEAKS: tuple[tuple[str, float, float | None], ...] = (
    ("GB300", 2500.0, 1250.0),
    ("B300", 2250.0, 1100.0),
    ("GB200", 2500.0, 1250.0),
    ("B200", 2250.0, 1100.0),
    ("H200", 989.5, 494.7),
    ("H100 PCIe", 756.0, 378.0),
    ("H100 NVL", 835.5, 417.5),
    ("H100", 989.5, 494.7),
    ("GH200", 989.5, 494.7),
    ("A100", 312.0, 156.0),
    ("A800", 312.0, 156.0),
    ("RTX PRO 6000", 503.8, 251.9),
    ("RTX 6000 Ada", 364.2, 182.1),
    ("RTX A6000", 154.8, 77.4),
    ("A40", 149.7, 74.8),
    ("A30", 165.0, 82.0),
    ("A10G", 70.0, 35.0),
    ("A10", 125.0, 62.5),
    ("L40S", 362.0, 183.0),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 60.0),
    ("V100", 125.0, 15.7),
    ("T4", 65.0, 8.1),
    ("RTX 5090", 209.5, 104.8),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 4080", 97.5, 48.7),
    ("RTX 3090", 71.0, 35.6),
    ("RTX 3080", 59.5, 29.8),
)


def flops_per_token(config: ModelConfig, n_params: int, n_frozen: int, seq_len: int) -> int:
    """Return the floating-point operations of a step, for each of its tokens.

    Rows that are only looked up are in no product: positions, and an embedding that is not the
    head too. Of the six operations for a parameter, two are its gradient, which frozen ones lack.

    Args:
        config: The network.
        n_params: All its parameters.
        n_frozen: Those of them that do not learn.
        seq_len: Tokens of a window.
    """
    looked_up = config.block_size * config.n_embd if config.position == "learned" else 0
    if not config.tie_embeddings:
        looked_up += (config.vocab_size or 0) * config.n_embd
    in_products = n_params - looked_up
    attention = 12 * config.n_layer * config.n_head * config.head_size * seq_len
    return 6 * in_products - 2 * min(n_frozen, in_products) + attention


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Return the operations a second that a device could do, None for one not in the table.

    Args:
        device_name: As the driver tells it, such as "NVIDIA A100-SXM4-80GB".
        dtype: float32, bfloat16 or float16.
    """
    words = f" {device_name.replace('-', ' ')} "
    for part, half, single in _PEAKS:
        if f" {part} " in words:
            peak = single if dtype == "float32" else half
            return peak * _TERA if peak is not None else None
    return None
