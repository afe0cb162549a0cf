"""The router certificate: python -m routers.certify router=NAME [overrides] [--quick] checks a router, prints a card.

Exit status 0 if every check passes or confirms a declared leak, 1 if one fails, 2 for bad input. Overrides are those of
run.py, a user's own too (extra_packages, hydra.searchpath); sizes are the certificate's own, and a router that needs a
trained baseline gets a stand-in. --quick leaves out the leak alarm, which trains for some seconds.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from routers.certificate import arithmetic, balance, scores, sight, state, tokens
from routers.certificate.alarm import leak_alarm
from routers.certificate.findings import CONFIRMED, EXACT, FAILED, MODES, NOT_APPLICABLE, Check, Finding
from routers.certificate.trial import Case
from routers.routing import Router, Site
from training.compose import composed
from training.targets import PACKAGES, check_targets, one_line, target

LEAK_CHECKS: dict[str, Check] = {
    f"{label} in {mode}": partial(sight.leak, what=what, mode=mode)
    for what, label in (("future", "blind to the future"), ("mates", "blind to batch mates"))
    for mode in MODES
}
CHECKS: dict[str, Check] = LEAK_CHECKS | {
    "evaluation is pure": state.evaluation_is_pure,
    "training and evaluation alike": tokens.routes_alike,
    "forward keeps state": state.training_keeps_state,
    "state of training counts": state.state_matters,
    "survives a checkpoint": state.survives_checkpoint,
    "every token accounted for": tokens.accounts_for_every_token,
    "loads": balance.loads,
    "balanced table at its bound": balance.table_reaches_its_bound,
    "evens a drifting stream": balance.evens_a_drifting_stream,
    "balancing loss as published": balance.loss_as_published,
    "equal to a loop, float64": partial(arithmetic.equals_the_loop, dtype=torch.float64, path="loop", tolerance=EXACT),
    "working path, float32": partial(
        arithmetic.equals_the_loop, dtype=torch.float32, path="grouped_mm", tolerance=2e-5
    ),
    "working path, bf16 on a GPU": arithmetic.equals_the_loop_on_a_gpu,
    "one expert is a plain FFN": arithmetic.one_expert_is_dense,
    "the same at any accumulation": arithmetic.same_at_any_accumulation,
    "learns where it should": scores.learns_where_it_should,
    "gradients stay finite": scores.gradients_stay_finite,
    "ties to the lowest expert": scores.ties_are_stable,
    "scores in float32": scores.scores_are_wide,
}

OF_CHOICE = (*LEAK_CHECKS, "training and evaluation alike", "state of training counts", "evens a drifting stream")
OF_CHOICE += ("learns where it should",)


def case_of(settings: DictConfig) -> Case:
    """The case of a composed config. Raises ValueError for what is wrong with its router or experts.

    As few experts as the router takes: 4, 8, ... up to num_experts. A table from a file has its own sizes and layers.
    """
    config: Any = OmegaConf.to_container(settings, resolve=True)
    check_targets(config, "", (*PACKAGES, *config["extra_packages"]))
    if config["router"].get("_target_") is None:
        raise ValueError("router must be one that routes; got router._target_=null, plain FFNs without a router")
    found, options = target({key: value for key, value in config["router"].items() if key != "baseline"}, 1, "router")
    if not issubclass(found, Router):
        raise ValueError(f"router._target_ must be a class of routers.routing.Router; got {found.__name__}")
    experts, more = target({key: v for key, v in config["experts"].items() if key != "num_shared"}, 4, "experts")
    wanted, in_file = config["num_experts"], names_a_file(config["router"])
    of_config = tuple(sorted(config["model"]["sparse_layers"]))
    sparse_layers = of_config if in_file else tuple(range(max(4, len(of_config))))

    def make_router(site: Site) -> Router:
        return found(site, **options)

    def case(number: int) -> Case:
        return Case(
            make_router,
            partial(experts, **more),
            num_experts=number,
            vocab_size=config["data"]["vocab_size"] if in_file else 64,
            num_shared=config["experts"]["num_shared"],
            activation=config["model"]["activation"],
            placement=config["model"]["placement"],
            sparse_layers=sparse_layers,
        )

    numbers = [] if in_file else [2**power for power in range(2, 12) if 2**power < wanted]
    for number in numbers:
        with contextlib.suppress(ValueError):
            routers = case(number).model(0).routers.values()
            if number >= 2 * max(router.experts_per_token // router.segments for router in routers):
                return case(number)  # with fewer, all experts see a token and nothing is left to decide
    case(wanted).model(0)
    return case(wanted)


def names_a_file(node: Any) -> bool:
    """Whether a router, or one inside it, reads its table from a file."""
    return node.get("file") is not None or any(isinstance(each, dict) and names_a_file(each) for each in node.values())


def findings(case: Case, checks: dict[str, Check]) -> Iterator[tuple[str, Finding, float]]:
    """(name, finding, seconds) of each check; one that raises has failed."""
    routers = case.model(0).routers.values()
    seen_by_all = case.num_experts <= min(router.experts_per_token // router.segments for router in routers)
    for name, check in checks.items():
        began = time.perf_counter()
        try:
            idle = seen_by_all and name in OF_CHOICE
            finding = Finding(NOT_APPLICABLE, "every token sees every expert") if idle else check(case)
        except Exception as error:  # whatever a router under test does wrong belongs on its card
            finding = Finding(FAILED, f"{type(error).__name__}: {one_line(error)}")
        yield name, finding, time.perf_counter() - began


def main(words: list[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    overrides = [word for word in words if word != "--quick"]
    try:
        if not any(word.startswith("router=") for word in overrides) or any(word[:1] == "-" for word in overrides):
            usage = "python -m routers.certify router=NAME [overrides] [--quick]"
            raise ValueError(f"usage: {usage}; got {' '.join(words) or 'nothing'}")
        case = case_of(composed(overrides))
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    torch.set_num_threads(2)
    print(f"certificate of {' '.join(overrides)}, E = {case.num_experts}\n")
    seen, began = [], time.perf_counter()
    for name, finding, _ in findings(case, CHECKS if "--quick" in words else CHECKS | {"leak alarm": leak_alarm}):
        seen.append(finding.status)
        print(f"{name:<36}{finding.status:<25}{finding.text}", flush=True)
    failed, confirmed, idle = (seen.count(status) for status in (FAILED, CONFIRMED, NOT_APPLICABLE))
    made = f"{len(seen) - idle} checks" + (f", {idle} not applicable" if idle else "")
    verdict = f"FAILED: {failed} of {made}" if failed else f"passed {made}"
    verdict += f", {confirmed} declared leaks confirmed" if confirmed else ""
    print(f"\n{verdict}; {time.perf_counter() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
