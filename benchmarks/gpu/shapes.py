"""The linear layers of real models, merged as vLLM merges them: q, k and v; gate and up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Decoder:
    """The widths that the linear layers of one decoder layer follow from."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_width: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """Output and input features of each layer."""
        attention = self.heads * self.head_width
        return {
            "qkv": (attention + 2 * self.key_value_heads * self.head_width, self.hidden),
            "o": (self.hidden, attention),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


# As in the config.json of each model.
MODELS: dict[str, Decoder] = {
    "SmolLM2-135M": Decoder(576, 1536, 9, 3, 64),
    "Llama-3.2-1B": Decoder(2048, 8192, 32, 8, 64),
    "Qwen2.5-7B": Decoder(3584, 18944, 28, 4, 128),
    "Llama-3-8B": Decoder(4096, 14336, 32, 8, 128),
}
# For a run that only shows that all is in place.
SMOKE_MODELS: dict[str, Decoder] = {"tiny": Decoder(64, 128, 2, 1, 32)}
