"""What `auto` chooses when a run begins, over times that are known."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from fundamentallm.compute import processor
from fundamentallm.compute.distributed import Ranks
from fundamentallm.compute.plan import Machine, Plan
from fundamentallm.config import RunConfig
from fundamentallm.data.loaders import Batching, TokenWindowLoader
from fundamentallm.engine.tuning import auto
from fundamentallm.engine.tuning.auto import Allowance, Length, choose, name_of
from fundamentallm.engine.tuning.measuring import Measurement, failed
from fundamentallm.engine.tuning.speed_cache import SpeedCache
from fundamentallm.errors import MachineError

PLAIN = Plan("fp32", False, False, "flash", 8, None)
NARROW = replace(PLAIN, precision="bf16", bf16_weights=True, attention="explicit")
COMPILED = replace(PLAIN, compile=True)
NATIVE = replace(PLAIN, precision="bf16", compile="native")
BOTH = replace(NARROW, compile=True)
CPU = torch.device("cpu")


class Times:
    """Measurements by setting; remembers what it was asked."""

    def __init__(self, **seconds: float | tuple[float, float]) -> None:
        self.known = {
            name.replace("_", " "): Measurement(*value)
            if isinstance(value, tuple)
            else Measurement(value)
            for name, value in seconds.items()
        }
        self.asked: list[str] = []

    def __call__(self, setting: Plan, slowest: float = 0.0) -> Measurement:
        name = name_of(setting)
        self.asked.append(name)
        return self.known.get(name, failed("unknown"))


class TestLength:
    def test_compilation_is_shared_by_the_steps(self):
        assert Length(100, None).seconds_per_step(Measurement(0.5, 20.0)) == pytest.approx(0.7)
        assert Length(100, None, 4).seconds_per_step(Measurement(0.5, 20.0)) == pytest.approx(2.2)

    def test_by_the_clock_it_costs_steps(self):
        # 80 of 100 seconds are left for steps of 0.5 s: 160 steps in 100 s
        assert Length(None, 100.0).seconds_per_step(Measurement(0.5, 20.0)) == pytest.approx(0.625)
        assert Length(None, 10.0).seconds_per_step(Measurement(0.5, 20.0)) == float("inf")

    def test_the_first_limit_counts(self):
        slow, fast = Measurement(2.0), Measurement(0.5)
        assert Length(100, 100.0).seconds_per_step(slow) == 2.0
        assert Length(100, 100.0).expected(slow) == 100.0
        assert Length(100, 100.0).expected(fast) == 50.0

    def test_without_a_limit_compilation_is_free(self):
        assert Length(None, None).seconds_per_step(Measurement(0.5, 20.0)) == 0.5


class TestChoice:
    def test_a_short_run_is_not_measured(self):
        times = Times()
        assert choose(PLAIN, NARROW, True, Length(99, None), times) == PLAIN
        assert times.asked == []

    def test_micro_batches_make_a_run_long(self):
        times = Times(fp32=0.001)
        choose(PLAIN, NARROW, True, Length(99, None, 2), times)
        assert times.asked == ["fp32"]

    def test_a_run_of_seconds_tries_nothing_else(self):
        times = Times(fp32=0.09, bf16=0.01)
        assert choose(PLAIN, NARROW, True, Length(100, None), times) == PLAIN
        assert times.asked == ["fp32"]

    def test_the_compiler_is_not_called_where_it_cannot_pay(self):
        times = Times(fp32=0.2, bf16=0.1)
        assert choose(PLAIN, NARROW, True, Length(100, None), times) == NARROW
        assert times.asked == ["fp32", "bf16"]

    def test_compilation_must_pay_within_the_run(self):
        times = Times(fp32=0.5, fp32_compiled=(0.4, 20.0))
        assert choose(PLAIN, None, True, Length(150, None), times) == PLAIN
        assert choose(PLAIN, None, True, Length(1000, None), times) == COMPILED

    def test_and_before_the_clock_ends_it(self):
        times = Times(fp32=0.5, fp32_compiled=(0.4, 20.0))
        assert choose(PLAIN, None, True, Length(None, 80.0), times) == PLAIN
        assert choose(PLAIN, None, True, Length(None, 300.0), times) == COMPILED

    def test_in_a_long_run_the_slower_type_gets_a_second_chance_compiled(self):
        times = Times(fp32=0.5, bf16=0.6, fp32_compiled=(0.4, 20.0), bf16_compiled=(0.2, 20.0))
        assert choose(PLAIN, NARROW, True, Length(10_000, None), times) == BOTH
        times.asked.clear()
        assert choose(PLAIN, NARROW, True, Length(300, None), times) == COMPILED
        assert times.asked == ["fp32", "bf16", "fp32 compiled"]

    def test_native_code_is_tried_first_and_where_it_wins_torch_does_not_compile(self):
        times = Times(fp32=0.5, bf16=0.6, bf16_native=(0.1, 3.0), fp32_compiled=(0.05, 20.0))
        chosen = choose(PLAIN, NARROW, True, Length(10_000, None), times, [NATIVE])
        assert chosen == NATIVE
        assert times.asked == ["fp32", "bf16", "bf16 native"]

    def test_native_code_that_is_slower_or_fails_leaves_the_others(self):
        times = Times(fp32=0.5, bf16=0.6, bf16_native=(0.7, 3.0), fp32_compiled=(0.3, 20.0))
        assert choose(PLAIN, None, True, Length(1000, None), times, [NATIVE]) == COMPILED
        times = Times(fp32=0.5, fp32_compiled=(0.3, 20.0))
        assert choose(PLAIN, None, True, Length(1000, None), times, [NATIVE]) == COMPILED

    def test_native_code_in_float32_wins_where_bfloat16_is_slow(self):
        times = Times(fp32=0.5, bf16=50.0, bf16_native=2.0, fp32_native=(0.3, 3.0))
        natives = [replace(NATIVE, precision="fp32"), NATIVE]
        chosen = choose(PLAIN, NARROW, True, Length(1000, None), times, natives)
        assert chosen == natives[0]
        assert "fp32 compiled" not in times.asked

    def test_native_code_must_pay_within_the_run_too(self):
        times = Times(fp32=0.1, bf16_native=(0.09, 3.0))
        assert choose(PLAIN, None, True, Length(100, None), times, [NATIVE]) == PLAIN
        times = Times(fp32=0.2, bf16_native=(0.19, 3.0))
        assert choose(PLAIN, None, True, Length(100, None), times, [NATIVE]) == PLAIN

    def test_a_small_gain_changes_nothing(self):
        times = Times(fp32=1.0, bf16=0.98)
        assert choose(PLAIN, NARROW, False, Length(10_000, None), times) == PLAIN

    def test_a_compiler_that_fails_is_out(self):
        times = Times(fp32=1.0)
        assert choose(PLAIN, None, True, Length(10_000, None), times) == PLAIN

    def test_a_hopeless_setting_may_stop_at_its_first_call(self):
        for seconds, limit in ((2.0, 8.0), (0.01, 1.0)):  # a first call has setup of its own
            limits = []

            def seconds_of(
                setting: Plan, slowest: float, limits=limits, seconds=seconds
            ) -> Measurement:
                limits.append(slowest)
                return Measurement(seconds)

            choose(PLAIN, NARROW, False, Length(10_000, None), seconds_of)
            assert limits == [float("inf"), limit]


class Clock:
    """Seconds that pass only in measurements."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TestAllowance:
    def choose(self, budget: float | None, step: float, native: float = 0.8) -> tuple[Clock, Times]:
        """Choose in a run of so many seconds on a machine whose steps take real time."""
        clock = Clock()
        allowance = Allowance(Allowance.of(budget).seconds, clock)
        times = Times(fp32=step, bf16=100 * step, fp32_compiled=(0.5 * step, 25.0))
        times.known["fp32 native"] = Measurement(native * step, 6.0)

        def seconds_of(plan: Plan, slowest: float) -> Measurement:
            found = times(plan)
            clock.now += found.step_seconds  # the call that warms up
            if found.step_seconds > slowest and not plan.compile:
                return found
            clock.now += max(auto.SECONDS, 2 * found.step_seconds) + found.compile_seconds
            if plan.compile == "native":
                allowance.built += found.compile_seconds
            return found

        native = replace(NATIVE, precision="fp32")
        choose(PLAIN, None, True, Length(None, budget), seconds_of, [native], allowance)
        self.used = allowance.used
        return clock, times

    def test_a_budget_of_two_minutes_gives_six_seconds(self):
        assert Allowance.of(120.0).seconds == pytest.approx(6.0)
        assert Allowance.of(None).seconds == 15.0

    @pytest.mark.parametrize("step", [0.001, 0.2, 0.6, 1.0, 2.5, 30.0])
    def test_it_is_kept_whatever_a_step_takes(self, step):
        self.choose(116.0, step)
        # one call cannot be cut short
        assert self.used <= max(0.05 * 116.0, step)

    def test_what_no_time_is_left_for_is_not_tried(self):
        _, times = self.choose(116.0, 1.5)
        assert times.asked == ["fp32"]
        _, times = self.choose(116.0, 0.5)
        assert times.asked == ["fp32", "fp32 native"]

    def test_what_is_known_already_takes_no_time(self):
        times = Times(fp32=1.0, fp32_native=(0.4, 3.0))
        native = replace(NATIVE, precision="fp32")
        for kept, asked in (((), ["fp32"]), ((native,), ["fp32", "fp32 native"])):
            times.asked.clear()
            allowance = Allowance(1.5, Clock())
            choose(PLAIN, None, True, Length(None, 30.0), times, [native], allowance, kept)
            assert times.asked == asked

    def test_the_build_of_native_code_is_not_counted(self):
        clock, _ = self.choose(116.0, 0.5)
        assert (clock.now > 6.0, self.used < 5.8) == (True, True)

    def test_torchs_compiler_is_for_budgets_that_bear_it(self):
        _, times = self.choose(299.0, 0.2, native=2.0)
        assert "fp32 compiled" not in times.asked
        _, times = self.choose(301.0, 0.2, native=2.0)
        assert "fp32 compiled" in times.asked


def config(**training: object) -> RunConfig:
    values = {"total_steps": 10_000, **training}
    return RunConfig.model_validate({"data": {"batch_size": 8}, "training": values})


def resolved(compile: bool = True, **training: object) -> RunConfig:
    fixed = {"attention": "flash", "bf16_weights": False, "precision": "fp32", **training}
    return config(**fixed, compile=compile)


def loader() -> TokenWindowLoader:
    return TokenWindowLoader(list(range(5)) * 300, Batching(16, 8))


class Group(Ranks):
    """A rank of two, among which messages go through a list."""

    box: ClassVar[list[str]] = []

    def __init__(self, rank: int) -> None:
        super().__init__(rank, 2, rank)

    def any(self, flag: bool) -> bool:
        return flag

    def broadcast_text(self, text: str, source: int = 0) -> str:
        if self.rank == source:
            self.box.append(text)
        return self.box[-1]


@pytest.fixture
def times(monkeypatch, tmp_path) -> Times:
    """Measurements in place of the real ones, and a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    times = Times(fp32=1.0, bf16=0.6, bf16_compiled=(0.3, 9.0), fp32_compiled=(0.5, 9.0))
    times.known["bf16 native"] = Measurement(0.7, 3.0)
    times.known["fp32 native"] = Measurement(1.1, 3.0)

    def measure(config, plan, windows, seconds, slowest, brief):
        assert len(windows[0].micro_batches) == 1
        return times(plan, slowest)

    monkeypatch.setattr(auto, "measure", measure)
    monkeypatch.setattr(processor, "cpu_rates", lambda: (1e11, 5e11))
    return times


AUTO = {"precision": "auto", "compile": "auto"}


def choose_auto(written, resolved, loader, device, ranks) -> tuple[RunConfig, list[str]]:
    """Choose as a run does; return the configuration with the choice, and the notes."""
    training = resolved.training
    plan = Plan(
        training.precision,
        training.bf16_weights,
        training.compile,
        training.attention,
        resolved.data.batch_size,
        machine=Machine(device, ranks),
    )
    plan, notes = auto.choose_auto(written, resolved, plan, loader)
    return plan.applied_to(resolved), notes


def test_the_choice_is_written_into_the_configuration(times):
    chosen, notes = choose_auto(config(**AUTO), resolved(), loader(), CPU, Ranks())

    training = chosen.training
    assert (training.precision, training.mixed_precision, training.bf16_weights) == (
        "bf16",
        True,
        True,
    )
    assert (training.attention, training.compile) == ("explicit", True)
    assert "auto: bf16 compiled; a micro-batch takes, measured now: fp32 1e+03 ms" in notes[0]


def test_native_code_is_chosen_for_a_block_that_it_knows(times):
    times.known["bf16 native"] = Measurement(0.1, 3.0)
    written = config(**AUTO)
    known = {"d_model": 64, "num_heads": 2, "d_ff": 96}
    model = written.model.model_copy(update=known)
    chosen, notes = choose_auto(
        written, resolved().model_copy(update={"model": model}), loader(), CPU, Ranks()
    )
    training = chosen.training
    assert (training.precision, training.compile, training.bf16_weights) == (
        "bf16",
        "native",
        False,
    )
    assert "auto: bf16 native" in notes[0]
    assert RunConfig.from_yaml(chosen.to_yaml()).training == training

    times.asked.clear()
    unknown = model.model_copy(update={"bias": True})
    choose_auto(written, resolved().model_copy(update={"model": unknown}), loader(), CPU, Ranks())
    assert "bf16 native" not in times.asked


def test_a_budget_too_short_to_measure_native_code_is_told(times, monkeypatch):
    monkeypatch.setattr(auto, "seconds_since_start", lambda: 3.0)
    for seconds, told in ((40.0, True), (150.0, False)):
        written = config(compile="auto", max_seconds=seconds)
        _, notes = choose_auto(written, resolved(max_seconds=seconds), loader(), CPU, Ranks())
        assert any("compile: native takes it without measuring" in note for note in notes) is told


def test_bfloat16_is_not_tried_where_its_products_are_slower(times, monkeypatch):
    monkeypatch.setattr(processor, "cpu_rates", lambda: (1e11, 1e9))
    choose_auto(config(**AUTO), resolved(), loader(), CPU, Ranks())
    assert times.asked == ["fp32", "fp32 native", "fp32 compiled"]


def test_native_code_that_cannot_be_built_leaves_the_others(times, monkeypatch):
    measure = auto.measure

    def refuses(config, *others, **more):
        if config.training.compile == "native":
            raise MachineError("the C++ compiler refuses the block's code")
        return measure(config, *others, **more)

    monkeypatch.setattr(auto, "measure", refuses)
    chosen, _ = choose_auto(config(**AUTO), resolved(), loader(), CPU, Ranks())
    assert (chosen.training.precision, chosen.training.compile) == ("bf16", True)


def test_copies_of_the_weights_that_were_asked_for_rule_native_code_out(times):
    written = config(**{**AUTO, "bf16_weights": True})
    choose_auto(written, resolved(), loader(), CPU, Ranks())
    assert "bf16 native" not in times.asked


def test_a_machine_is_measured_once(times):
    first, _ = choose_auto(config(**AUTO), resolved(), loader(), CPU, Ranks())
    times.asked.clear()
    again, notes = choose_auto(config(**AUTO), resolved(), loader(), CPU, Ranks())

    assert again == first
    assert times.asked == []
    assert "read from" in notes[0]


def test_another_number_of_threads_is_measured_anew(times):
    choose_auto(config(**AUTO), resolved(), loader(), CPU, Ranks())
    times.asked.clear()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        choose_auto(config(**AUTO), resolved(), loader(), CPU, Ranks())
    finally:
        torch.set_num_threads(threads)
    assert times.asked[0] == "fp32"


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ({}, []),
        ({"precision": "fp32"}, []),
        ({"mixed_precision": True}, []),  # asks for the narrow type
        ({"precision": "auto"}, ["fp32", "bf16"]),
        ({"compile": "auto"}, ["fp32", "fp32 native", "fp32 compiled"]),
        ({"compile": True}, []),
    ],
)
def test_only_auto_is_chosen(times, written, asked):
    start = resolved(compile=bool(written.get("compile", False)))
    choose_auto(config(**written), start, loader(), CPU, Ranks())
    assert times.asked == asked


def test_without_a_compiler_nothing_is_compiled(times):
    chosen, _ = choose_auto(config(compile="auto"), resolved(compile=False), loader(), CPU, Ranks())
    assert times.asked == []
    assert chosen.training.compile is False


def test_on_a_gpu_the_type_is_not_measured(times, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    start = resolved(precision="bf16")
    chosen, _ = choose_auto(config(**AUTO), start, loader(), torch.device("cuda", 0), Ranks())
    assert times.asked == ["bf16 autocast", "bf16 autocast compiled"]
    assert chosen.training.precision == "bf16"


def test_all_ranks_take_the_choice_of_the_first(times):
    first, notes = choose_auto(config(**AUTO), resolved(), loader(), CPU, Group(0))
    asked = len(times.asked)
    times.known.clear()
    second, _ = choose_auto(config(**AUTO), resolved(), loader(), CPU, Group(1))

    assert second == first
    assert first.training.precision == "bf16"
    assert len(times.asked) == asked
    assert notes


def test_another_kernel_is_another_figure(times):
    choose_auto(config(precision="auto"), resolved(compile=False), loader(), CPU, Ranks())
    times.asked.clear()
    chosen, _ = choose_auto(
        config(precision="auto", attention="flash"), resolved(compile=False), loader(), CPU, Ranks()
    )
    assert times.asked == ["bf16"]  # its kernel was the other one; that of fp32 was the same
    assert chosen.training.attention == "flash"


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_where_one_rank_has_no_compiler_none_compiles(times, precision, caplog):
    class Mixed(Group):
        def any(self, flag: bool) -> bool:
            return True

    chosen = [
        choose_auto(
            config(compile="auto", precision=precision),
            resolved(compile=rank == 0),
            loader(),
            CPU,
            Mixed(rank),
        )[0].training
        for rank in (0, 1)
    ]
    assert [training.compile for training in chosen] == [False, False]
    assert chosen[0].precision == chosen[1].precision
    assert "another rank found no C++ compiler" in caplog.text


def test_an_error_of_the_first_rank_does_not_leave_the_others_waiting(times, monkeypatch):
    def failing(*_):
        raise OSError("the disk has gone")

    monkeypatch.setattr(auto, "circumstances_of", failing)
    with pytest.raises(OSError, match="the disk has gone"):
        choose_auto(config(**AUTO), resolved(), loader(), CPU, Group(0))
    with pytest.raises(SystemExit):
        choose_auto(config(**AUTO), resolved(), loader(), CPU, Group(1))


def test_documents_apart_are_not_compiled(times):
    written = config(**AUTO)
    data = written.data.model_copy(update={"packing": "document"})
    start = resolved().model_copy(update={"data": data})
    chosen, _ = choose_auto(
        written.model_copy(update={"data": data}), start, loader(), CPU, Ranks()
    )
    assert times.asked == ["fp32", "bf16"]
    assert chosen.training.compile is False


def test_a_failing_measurement_is_a_warning_and_the_plain_way(times, monkeypatch, caplog):
    def failing(*_, **__):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(auto, "measure", failing)
    with caplog.at_level(logging.WARNING):
        chosen, notes = choose_auto(config(**AUTO), resolved(), loader(), CPU, Group(0))
        other, _ = choose_auto(config(**AUTO), resolved(), loader(), CPU, Group(1))

    assert (chosen.training.precision, chosen.training.compile) == ("fp32", False)
    assert other == chosen
    assert notes == []
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the measurement failed and is ignored: out of memory" in caplog.text


def test_a_broken_cache_is_no_obstacle(times, caplog):
    path = SpeedCache().path
    path.parent.mkdir(parents=True)
    path.write_text("{")
    chosen, _ = choose_auto(config(**AUTO), resolved(), loader(), CPU, Ranks())
    assert chosen.training.compile is True
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    choose_auto(config(**AUTO), resolved(), loader(), CPU, Ranks())
    assert len(caplog.records) == 1
