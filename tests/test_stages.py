"""Cutting networks into pipeline stages."""

from itertools import combinations, pairwise

import pytest
import torch

from loft_hpc.analysis.size import network_size, section_flops
from loft_hpc.errors import LoftError
from loft_hpc.models.architecture import MODEL_NAMES, architecture
from loft_hpc.models.resnet import ResidualNetwork, build
from loft_hpc.pipeline.stages import Stage, _balanced, check_split, cuts, parts


def test_the_posters_cuts():
    network = architecture("preresnet34", 10, widen=2)
    assert cuts(network, "stages", 2, 32) == (7,)  # after stage 2: 3 + 4 blocks
    assert cuts(network, "stages", 4, 32) == (3, 7, 13)
    assert cuts(network, "stages", 1, 32) == ()
    # facts/loft.md: 64x32x32, 128x16x16, 256x8x8 at the three boundaries
    outputs = network.block_outputs(32)
    assert [outputs[block - 1] for block in (3, 7, 13)] == [(64, 32, 32), (128, 16, 16), (256, 8, 8)]


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
def test_balanced_is_the_best_of_all_cuts(stages):
    flops = section_flops(architecture("resnet20", 10), 8)
    weights = [flops[0] + flops[1], *flops[2:-2], flops[-2] + flops[-1]]

    def largest(chosen) -> int:
        ends = [0, *chosen, len(weights)]
        return max(sum(weights[a:b]) for a, b in pairwise(ends))

    best = min(largest(chosen) for chosen in combinations(range(1, len(weights)), stages - 1))
    assert largest(_balanced(flops, stages)) == best


@pytest.mark.parametrize("model", MODEL_NAMES)
@pytest.mark.parametrize(("stem", "size"), [("cifar", 8), ("cifar", 33), ("imagenet", 96), ("imagenet", 225)])
def test_outputs_of_blocks_are_what_the_network_makes(model, stem, size):
    network = architecture(model, 10, stem=stem)
    with torch.device("meta"):
        x, made = torch.empty(2, 3, size, size), []
        sections = ResidualNetwork(network, network.hidden_widths()).eval().sections()
        for section in sections[:-1]:
            x = section(x)
            made.append(tuple(x.shape[1:]))
    assert network.block_outputs(size) == made[1:]
    assert sum(section_flops(network, size)) == network_size(network, None, size).flops


@pytest.mark.parametrize("model", ["resnet20", "preresnet18"])
def test_stages_one_after_the_other_are_the_network(model):
    network_description = architecture(model, 10)
    network = build(network_description, seed=0).eval()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = network(x)
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    held = []
    for part in parts(network_description, cuts(network_description, "balanced", 4, 16)):
        stage = Stage(network, part)
        x = stage(x)
        names = part.parameters(shapes, network_description).shapes
        own = dict(network.named_parameters())
        assert {id(parameter) for parameter in stage.parameters()} == {id(own[name]) for name in names}
        held += names
    assert torch.equal(x, expected)
    assert held == list(shapes)


@pytest.mark.parametrize(
    ("split", "ranks", "told"),
    [
        ("stages", 4, "resnet20 has 3 stages, too few for 4 ranks"),
        ("balanced", 10, "resnet20 has 9 blocks, which make no 10 pipeline stages"),
        ("3", 3, "makes 2 stages for 3 ranks"),
        ("3,9", 3, "cuts after block 9, but resnet20 has 9"),
    ],
)
def test_cuts_that_do_not_exist(split, ranks, told):
    with pytest.raises(LoftError, match=told):
        cuts(architecture("resnet20", 10), split, ranks, 8)


@pytest.mark.parametrize("split", ["3,3", "5,2", "0,2", "halves", "3,", ""])
def test_splits_that_cannot_be_read(split):
    with pytest.raises(LoftError, match="is not known") as problem:
        check_split(split)
    assert problem.value.usage
