"""Recipes: complete, with costs that follow from their FLOPs, and shown before a run starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffscale.config.load import load_experiment, load_tree, merge, validate
from diffscale.config.recipes import describe, recipe_of, recipes, recipes_table, rental
from diffscale.core.errors import UserError

ALL = recipes()
PATH = "data.path=builtin:emoji"


def network_of(name: str) -> str:
    """The published network of a recipe: FLOPs are checked against the committed table of networks."""
    from diffscale.config.load import read_tree

    tree = read_tree(name)
    preset = tree.get("model", {}).get("preset")
    return preset or (network_of(tree["base"]) if "base" in tree else "ddpm-cifar10")  # icfm: DDPM's widths


def committed_flops() -> dict[str, float]:
    import diffscale.models

    text = (Path(diffscale.models.__file__).parent / "README.md").read_text(encoding="utf-8")
    rows = text[text.index("<!-- models:begin -->") : text.index("<!-- models:end -->")].splitlines()[3:]
    return {row.split("`")[1]: float(row.split("|")[-2].replace(",", "")) * 1e9 for row in rows}


def test_the_papers_of_the_list_have_recipes():
    wanted = {
        *("ddpm-cifar10", "iddpm-cifar10", "iddpm-imagenet64", "edm-cifar10", "edm-ffhq64", "edm-imagenet64"),
        *("edm2-imagenet64-s", "adm-imagenet64", "rin-cifar10", "rin-imagenet64", "sid-imagenet128"),
        *("dit-b-4", "dit-xl-2", "jit-b-16", "hdit-imagenet128", "icfm-cifar10"),
    }
    assert wanted <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_flops_hours_and_price_follow_from_the_network_and_the_images(name: str):
    recipe, images = ALL[name], load_tree(name)["train"]["images"]
    assert recipe.flops == pytest.approx(committed_flops()[network_of(name)] * images, rel=0.01)
    assert recipe.h200 == rental(recipe.flops, recipe.h200.mfu, recipe.h200.usd_per_hour)


@pytest.mark.parametrize(("name", "side"), [("edm-cifar10", 32), ("edm-ffhq64", 64), ("edm2-imagenet64-s", 64)])
def test_adams_eps_is_that_of_a_summed_loss(name: str, side: int):
    """The authors divide the sum of squares by the batch alone (edm training/training_loop.py:132)."""
    assert load_experiment(name, [PATH]).optim.eps == pytest.approx(1e-8 / (3 * side**2), rel=0.02)


def test_a_recipe_leaves_the_data_to_the_user():
    with pytest.raises(UserError, match=r"data\.path"):
        load_experiment("edm-cifar10")


def test_a_recipe_is_told_with_what_it_differs_in():
    experiment = load_experiment("edm-cifar10", [PATH])
    lines = describe("edm-cifar10", experiment, ALL["edm-cifar10"].flops)
    text = "\n".join(lines)
    for part in ("Karras et al. 2022", "FID 1.97", "n = 50,000", "hours of one H200", "assumed MFU of 30%", "differs"):
        assert part in text
    assert "changed" not in text
    assert "changed" in "\n".join(describe("edm-cifar10", experiment, 1e18))
    assert describe("quickstart-unet", experiment, 1.0) == []


def test_the_committed_table_of_recipes_is_current():
    import diffscale.models

    text = (Path(diffscale.models.__file__).parent / "README.md").read_text(encoding="utf-8")
    part = text[text.index("<!-- recipes:begin -->") : text.index("<!-- recipes:end -->")]
    assert part.removeprefix("<!-- recipes:begin -->").strip() == recipes_table()


def test_rins_recipes_have_the_authors_start_and_lamb():
    """google-research/pix2seq: `exclude_from_weight_decay` of the configurations; no clipping in `build_optimizer`."""
    for name, decay_on in (("rin-cifar10", "matrices"), ("rin-imagenet64", "all")):
        experiment = load_experiment(name, [PATH])
        optim = experiment.optim
        assert (optim.name, optim.decay_on, optim.trust_ratio, optim.clip_grad_norm) == (
            "lamb",
            decay_on,
            "always",
            None,
        )
        assert experiment.model.start == "authors"


def test_a_wrong_section_is_named(tmp_path: Path):
    file = tmp_path / "own.yaml"
    file.write_text("base: edm-cifar10\nrecipe: {paper: mine}\n")
    with pytest.raises(UserError, match=r"recipe\.data"):
        recipe_of(str(file))
    file.write_text("base: edm-cifar10\nname: own\n")
    assert recipe_of(str(file)) is None
    assert validate(merge(load_tree(str(file)), {"data": {"path": str(tmp_path)}})).optim.eps == 3.3e-12


def test_recipes_of_networks_with_twice_the_channels_learn_the_variance():
    for name in ALL:
        model = load_tree(name)["model"]
        learned = load_experiment(name, [PATH]).diffusion.variance == "learned_range"
        assert learned == bool(model.get("out_channels", 0))
