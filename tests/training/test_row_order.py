"""The order of a run, and training on packed rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler
from trl import SFTConfig

from lora_llava.core.errors import StoppedError, UserError
from lora_llava.model.start import prepare_base
from lora_llava.planning.row_order import batch_samples, order_rows
from lora_llava.planning.run_plan import plan_run
from lora_llava.recipe import RecipeError, TrainingSection
from lora_llava.recipe.io import check_recipe
from lora_llava.runs.directory import start_run
from lora_llava.runs.resume import find_start
from lora_llava.training.callbacks import StopOnSignal
from lora_llava.training.stages import build_feeds, build_trained_model, train, warmup_steps


def section(**values: Any) -> TrainingSection:
    return TrainingSection(learning_rate=1e-3, **values)


@given(count=st.integers(1, 60), size=st.integers(1, 7), epoch=st.integers(0, 3), grouped=st.booleans())
def test_every_sample_is_in_one_batch(count: int, size: int, epoch: int, grouped: bool) -> None:
    batches = batch_samples(range(10, 10 + count), size, epoch=epoch, grouped=grouped)
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1)
    assert batches == batch_samples(range(10, 10 + count), size, epoch=epoch, grouped=grouped)


def test_grouped_batches_hold_similar_lengths() -> None:
    lengths = [(i * 37) % 100 for i in range(100)]
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batch_samples(lengths, 4, grouped=True)]
    assert max(spread) <= 3
    assert batch_samples(lengths, 4, grouped=True)[0] != batch_samples(lengths, 4, grouped=True, epoch=1)[0]


def test_a_run_has_the_epochs_of_the_recipe() -> None:
    order = order_rows(section(epochs=1.5, batch_size=5, gradient_accumulation=2), [10] * 24, seed=0, padded=False)
    assert [len(row) for row in order.rows] == [5, 5, 5, 5, 4, 5, 5, 5]  # 5 batches, and 3 of the second pass's 5
    assert order.steps == 4
    assert order.samples_per_step == 39 / 4
    assert (order.tokens_per_row, order.longest_row) == (390 / 8, 50)


@pytest.mark.parametrize(
    ("epochs", "samples", "rows"),
    [
        (2.1, 100, 210),
        (1.1, 10, 11),
        (0.07, 100, 7),
        (0.29, 100, 29),
        (3.3, 10, 33),
        (0.45, 20, 9),
        (4.35, 100, 435),
        (2.11, 100, 211),
        (0.001, 10, 1),
        (3.0, 7, 21),
        (1e-7, 10, 1),
    ],
)
def test_a_fraction_of_an_epoch_is_that_share_of_its_rows(epochs: float, samples: int, rows: int) -> None:
    order = order_rows(section(epochs=epochs), [10] * samples, seed=0, padded=False)
    assert sum(map(len, order.rows)) == rows
    packed = section(epochs=epochs, max_tokens_per_row=16)
    assert len(order_rows(packed, [16] * samples, seed=0, padded=False).rows) == rows


SCHEDULERS = ("cosine", "linear", "constant_with_warmup")


def rates(share: float, steps: int, scheduler: str) -> list[float]:
    """Return the learning rates of a run's steps from transformers' schedule; 1 is the peak."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(scheduler, optimizer, warmup_steps(share, steps), steps)
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_first_of_very_few_steps_trains(scheduler: str, steps: int) -> None:
    assert rates(0.03, steps, scheduler)[0] == 1.0
    assert max(rates(0.99, steps, scheduler)) == 1.0
    assert rates(0.0, steps, scheduler)[0] == 1.0


def test_warm_up_is_that_of_transformers_but_never_all_steps() -> None:
    for share in (0.0, 0.01, 0.03, 0.1, 0.5, 0.9, 0.99):
        for steps in range(4, 300):
            theirs = SFTConfig(warmup_steps=share, use_cpu=True, bf16=False, report_to="none").get_warmup_steps(steps)
            assert warmup_steps(share, steps) == min(theirs, steps - 1)
    assert [warmup_steps(0.03, 6), warmup_steps(0.03, 100), warmup_steps(0.03, 101)] == [1, 3, 4]  # LLaVA's, six steps
    assert [warmup_steps(0.5, 2), warmup_steps(0.9, 2), warmup_steps(0.9, 1)] == [1, 1, 0]


def test_a_run_of_one_step_trains_at_its_full_learning_rate(
    stage2_content: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    stage2_content["training"] |= {"max_steps": 1, "learning_rate": 1e-3, "log_every": 1}
    recipe = check_recipe(stage2_content, "test")
    plan, base = plan_run(recipe), prepare_base(recipe.model, 0)
    Path(recipe.output_dir).mkdir()
    model = build_trained_model(recipe, base)
    before = {name: weight.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    result = train(plan, base, model)
    assert result.curves["learning_rate"] == [(1, 1e-3)]
    changed = [name for name, weight in model.named_parameters() if name in before and (weight != before[name]).any()]
    assert any("lora_B" in name for name in changed)
    assert "of 1 steps 0 are warm-up" in capsys.readouterr().out


def test_a_run_of_fixed_steps_repeats_the_data() -> None:
    training = section(max_steps=7, max_tokens_per_row=25, gradient_accumulation=2)
    order = order_rows(training, [10] * 6, seed=0, padded=False)
    assert [len(row) for row in order.rows] == [2] * 14
    assert order.steps == 7
    passes = [sorted(i for row in order.rows[n : n + 3] for i in row) for n in (0, 3, 6, 9)]
    assert passes == [list(range(6))] * 4
    assert order.rows[:3] != order.rows[3:6]


def packed_content(content: dict[str, Any], **training: Any) -> dict[str, Any]:
    content["training"] |= {"batch_size": 1, "max_tokens_per_row": 250, "share_images": "off"} | training
    return content


def test_packed_rows_train_every_token_and_resume_exactly(
    stage2_content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 samples in rows of 250 tokens, two rows per step; stopped after the second step, within an epoch."""
    packed_content(stage2_content, max_steps=None, epochs=2, gradient_accumulation=2, eval_every=100)

    def trained(name: str, stop_at: int | None = None, resume: bool = False) -> Any:
        stage2_content["output_dir"] = str(tmp_path / name)
        recipe = check_recipe(stage2_content, "test")
        plan = plan_run(recipe)
        start_run(Path(recipe.output_dir), recipe, {"train": plan.splits["train"].fingerprint()})
        start = find_start(tmp_path / name / "checkpoints", recipe) if resume else None
        model = build_trained_model(recipe, prepare_base(recipe.model, 0))
        on_step_end = StopOnSignal.on_step_end

        def stopping(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.number = 2 if state.global_step == stop_at else self.number
            on_step_end(self, args, state, control, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(StopOnSignal, "on_step_end", stopping)
            if stop_at is not None:
                with pytest.raises(StoppedError, match="stopped at step 2 of"):
                    train(plan, prepare_base(recipe.model, 0), model, start)
                return plan, None, None
            result = train(plan, prepare_base(recipe.model, 0), model, start)
        return plan, result, {name: p for name, p in model.named_parameters() if p.requires_grad}

    plan, result, expected = trained("whole")
    order = plan.order
    assert sorted(i for row in order.rows for i in row) == sorted(list(range(24)) * 2)
    assert max(order.longest_row, 200) == order.longest_row <= 250
    assert result.steps == order.steps > 4
    assert result.tokens == 2 * plan.splits["train"].report.tokens
    assert result.supervised_tokens == 2 * plan.splits["train"].report.supervised_tokens
    trained("stopped", stop_at=2)
    _, _, found = trained("stopped", resume=True)
    assert all(torch.equal(found[name], parameter) for name, parameter in expected.items())


def test_a_step_does_not_depend_on_the_layout_of_its_samples(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    """Eight samples per step in eight rows, two batches or one row have the same loss, gradient and projector."""
    ends = []
    stage2_content["model"]["quantization"] = "none"
    layouts = ({"batch_size": 1, "gradient_accumulation": 8}, {"batch_size": 4, "gradient_accumulation": 2})
    for index, layout in enumerate((*layouts, {"batch_size": 8})):
        stage2_content["training"] |= {"gradient_accumulation": 1, "max_steps": 1, "log_every": 1} | layout
        stage2_content["output_dir"] = str(tmp_path / str(index))
        recipe = check_recipe(stage2_content, "test")
        plan = plan_run(recipe)
        plan.order.rows.clear()
        size = layout["batch_size"]
        plan.order.rows.extend(list(range(start, start + size)) for start in range(0, 8, size))
        Path(recipe.output_dir).mkdir()
        model = build_trained_model(recipe, prepare_base(recipe.model, 0))
        result = train(plan, prepare_base(recipe.model, 0), model)
        ends.append((result.loss_curve["train"][0][1], result.best_validation_loss))
    for loss, validation in ends[1:]:
        assert loss == pytest.approx(ends[0][0], rel=1e-5)
        assert validation == pytest.approx(ends[0][1], rel=1e-3)  # after a step of Adam


def test_the_validation_loss_does_not_depend_on_the_batch_size(stage2_content: dict[str, Any], tmp_path: Path) -> None:
    losses = []
    stage2_content["training"] |= {"learning_rate": 1e-12, "max_steps": 1}
    for size in (1, 4, 6):
        stage2_content["training"]["batch_size"] = size
        stage2_content["output_dir"] = str(tmp_path / str(size))
        recipe = check_recipe(stage2_content, "test")
        plan, base = plan_run(recipe), prepare_base(recipe.model, 0)
        Path(recipe.output_dir).mkdir()
        losses.append(train(plan, base, build_trained_model(recipe, base)).best_validation_loss)
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


def test_a_validation_split_has_its_own_images(stage2_content: dict[str, Any]) -> None:
    """Images in a table are named by their row, so every split has the same names."""
    plan = plan_run(check_recipe(stage2_content, "test"))
    train_feed, validation = build_feeds(plan)
    assert validation is not None
    assert validation.collator.load_pixels.images is plan.splits["validation"].images
    assert train_feed.collator.load_pixels.images is plan.splits["train"].images


def test_a_sample_longer_than_a_row_is_named_with_the_fix(stage2_content: dict[str, Any]) -> None:
    packed_content(stage2_content, max_tokens_per_row=40)
    message = r"row \d+ has \d+ tokens, over training.max_tokens_per_row 40; raise it, or set data.max_length=40 with"
    with pytest.raises(UserError, match=message):
        plan_run(check_recipe(stage2_content, "test"))


def test_two_sizes_of_a_forward_pass_are_refused(stage2_content: dict[str, Any]) -> None:
    with pytest.raises(
        RecipeError, match=r"training.batch_size is 4 together with training.max_tokens_per_row, .* drop one"
    ):
        check_recipe(packed_content(stage2_content, batch_size=4), "test")
    stage2_content["model"]["attention"] = "sdpa"
    with pytest.raises(RecipeError, match=r"model.attention is sdpa, which pads; training.max_tokens_per_row needs"):
        check_recipe(packed_content(stage2_content), "test")


def test_packing_where_rows_are_padded_is_refused(stage2_content: dict[str, Any], monkeypatch: Any) -> None:
    recipe = check_recipe(packed_content(stage2_content), "test")
    monkeypatch.setattr("lora_llava.planning.run_plan.is_padding_free", lambda recipe, config: (False, "sdpa, padded"))
    with pytest.raises(UserError, match="max_tokens_per_row needs rows without padding; this machine has sdpa, padded"):
        plan_run(recipe)
