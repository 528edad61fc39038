"""torch.compile of the U-Net: three graphs serve any number of buckets."""

import pytest
import torch
import torch._dynamo

from sdxl_trainer.train.tiny.build import build_tiny_unet

LATENT_SIZES = [(16, 16), (16, 24), (24, 16), (8, 32), (20, 12)]


@pytest.mark.long
def test_three_graphs_serve_all_buckets() -> None:
    unet, graphs = build_tiny_unet().train(), []

    def count_graph(graph: torch.fx.GraphModule, _: list[torch.Tensor]):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    unet.compile(backend=count_graph)
    config, numbers = unet.config, []
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    for height, width in LATENT_SIZES:
        unet(
            torch.randn(2, 4, height, width),
            torch.tensor([3, 700]),
            torch.randn(2, 77, config.cross_attention_dim),
            added_cond_kwargs={"text_embeds": torch.randn(2, pooled), "time_ids": torch.zeros(2, 6)},
        )
        numbers.append(len(graphs))
    assert numbers == [1, 2, 3, 3, 3]
