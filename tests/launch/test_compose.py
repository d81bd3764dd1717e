"""From words on a command line to a typed job, and the sentence that refuses the wrong ones."""

import pytest

from launch import compose

RECIPE = "recipe=quickstart"


def test_a_saved_job_starts_the_same_job_again(tmp_path):
    job = compose.compose([RECIPE, "optimizer.lr=0.00123"])
    compose.save(job, tmp_path / "config.yaml")
    assert compose.load(tmp_path / "config.yaml") == job
    assert job.optimizer.lr == 0.00123
    assert job.composed_from["recipe"] == "quickstart"


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["optimizer.lrr=1"], ["optimizer.lrr", "did you mean", "lr"]),
        (["model.num_layres=1"], ["model.num_layres", "num_layers"]),
        (["batch.micro_batch_size=two"], ["batch.micro_batch_size=two", "Integer"]),
        (["model=index_1p9c"], ["model=index_1p9c", "index_1p9b"]),
        (["phases.0.tokns=1"], ["phases.0.tokns"]),
        (["optmizer.lr=1"], ["optmizer", "optimizer"]),
        (["recipe=quickstrat"], ["quickstrat", "quickstart"]),
    ],
)
def test_a_wrong_word_is_refused_in_one_sentence_that_names_it(typed, words):
    with pytest.raises(ValueError) as refusal:
        compose.compose([RECIPE, *typed] if "recipe" not in typed[0] else typed)
    sentence = str(refusal.value)
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence


def test_no_recipe_and_no_model_says_what_to_choose():
    with pytest.raises(ValueError, match="choose recipe="):
        compose.compose([])


def test_single_values_change_with_their_type_checked():
    job = compose.compose([RECIPE])
    changed = compose.override(job, ["phases.0.tokens=64", "model.norm_head=false"])
    assert changed.phases[0].tokens == 64 and not changed.model.norm_head
    with pytest.raises(ValueError, match="tokens=many"):
        compose.override(job, ["phases.0.tokens=many"])


def test_commas_make_several_runs():
    assert compose.sweep(["a=1,2", "b=x", "c=3,4"]) == [
        ["a=1", "b=x", "c=3"],
        ["a=1", "b=x", "c=4"],
        ["a=2", "b=x", "c=3"],
        ["a=2", "b=x", "c=4"],
    ]


@pytest.mark.parametrize("text", ["name: ${oc.env:HOME}\n", "name: !!python/object:os.system x\n"])
def test_a_saved_job_is_only_data(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml"):
        compose.load(tmp_path / "config.yaml")


def test_whole_phases_and_new_sources_can_be_given():
    job = compose.compose(
        [RECIPE, "phases=[{tokens: 64, schedule: {name: cosine}}, {tokens: 8}]",
         "data.sources.web.path=a/b", "name=x"]
    )  # fmt: skip
    assert [p.tokens for p in job.phases] == [64, 8]
    assert job.phases[0].schedule.name == "cosine"
    assert job.data.sources["web"].path == "a/b"


@pytest.mark.parametrize("content", [b"", b"- 1\n", b"\xff\xfe\x00"])
def test_an_empty_or_damaged_config_is_refused_by_name(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.yaml is not a saved job"):
        compose.load(tmp_path / "config.yaml")


def test_an_empty_mapping_takes_away_what_a_recipe_names() -> None:
    words = ["recipe=quickstart", "data.validation.more={path: x}"]
    assert "more" in compose.compose(words).data.validation
    assert compose.compose([*words, "data.validation={}"]).data.validation == {}
