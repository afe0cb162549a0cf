"""What training costs, in matrix products. S positions of the decoder, R of the source, W width"""

from typing import TYPE_CHECKING

from models.feedforward import FeedForward, SparseFeedForward

if TYPE_CHECKING:
    from models.transformer import Transformer


def window_flops(model: "Transformer") -> int:
    """FLOPs of forward and backward over one window, 3 times the forward's of what learns; attention over all of it.

    The routers' products count, and a baseline's forward pass where a router reads its prediction; norms,
    activations and the softmax do not.
    """
    width, layers, encoders = model.settings.d_model, model.settings.num_layers, model.settings.encoder_layers
    decoder, encoder = model.lengths
    projections, scores = 2 * 4 * width * width, 2 * 2 * width  # of a position; of a query and a key
    forward = decoder * (layers * (projections + decoder * scores) + 2 * width * len(model.embedding))
    forward += encoder * encoders * (projections + encoder * scores)
    if encoders:  # half of cross-attention's projections are of the source
        forward += layers * ((decoder + encoder) * projections // 2 + decoder * encoder * scores)
    fixed = 0
    for name, ffn in model.named_modules():
        positions = encoder if name.startswith("encoder.") else decoder
        if isinstance(ffn, FeedForward):
            forward += positions * ffn.experts.flops()
        if isinstance(ffn, SparseFeedForward):
            router = ffn.router
            each = ffn.experts.flops() * router.experts_per_token // router.segments + router.forward_flops
            forward += positions * (each + (ffn.shared.flops() if ffn.shared is not None else 0))
            fixed += positions * router.fixed_flops
    baseline = model.unregistered[0]
    if baseline is not None and any(router.uses_prediction for router in model.routers.values()):
        fixed += window_flops(baseline) // 3
    return 3 * forward + fixed
