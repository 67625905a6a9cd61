"""AdamW for weights of any type: what 16 bits would round away is kept in float32 beside them."""
import engine.blas  # noqa: F401  (before mlx)
import mlx.core as mx
import mlx.optimizers as optim


class AdamW(optim.AdamW):
    """MLX's AdamW with float32 moments and, for weights of 16 bits, float32 masters beside them.

    The masters take the steps and the model holds them rounded, so that training, sampling and what
    is saved are one and the same weights. In 16 bits alone a small step would round to none, and
    so would the decay of 0.999 of the second moment. source  Micikevicius 1710.03740
    """

    def init_single(self, parameter: mx.array, state: dict):
        super().init_single(parameter.astype(mx.float32), state)
        if parameter.dtype != mx.float32:
            state["master"] = parameter.astype(mx.float32)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        # MLX computes learning rate, decay and bias correction in the gradient's type
        gradient = gradient.astype(mx.float32)
        if "master" not in state:
            return super().apply_single(gradient, parameter, state)
        state["master"] = super().apply_single(gradient, state["master"], state)
        return state["master"].astype(parameter.dtype)
