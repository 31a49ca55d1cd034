"""Why a server's answers differ: its prompts, its stop, its weights or its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jinja2 import TemplateError

from lora_llava.inference.served.prompt_pairs import PromptFault, PromptPair, first_difference, prompt_fault
from lora_llava.inference.served.server_facts import ServerFacts
from lora_llava.publishing.verify.compared import ComparedAnswer
from lora_llava.publishing.verify.fixes import Fault, ServerFault, fix_of
from lora_llava.publishing.verify.model_here import ModelHere
from lora_llava.publishing.verify.served_answers import lacks_images
from lora_llava.publishing.verify.variants import NOISE, Fit, as_here, best_variant

_NEARLY = 0.5
"""Nats by which one token is likelier than another at most where rounding may decide between them."""
_WEIGHTS = ("base served", "adapter not active")
_AROUND = 6
"""Ids shown on both sides of a difference."""


class Diagnosis:
    """The faults of a server.

    Args:
        here: The model here.
        compared: The questions with both answers.
        facts: What the server reports about itself.
        asked_for: The model's name on the server.

    Attributes:
        findings: The faults, in the order in which to fix them.
        difference: Mean difference of the answers' log-probabilities from those here, in nats per token; None if
            unknown.
    """

    def __init__(self, here: ModelHere, compared: Sequence[ComparedAnswer], facts: ServerFacts, asked_for: str) -> None:
        self.here, self.compared, self.facts, self.asked_for = here, compared, facts, asked_for
        self.findings: list[ServerFault] = []
        self.difference: float | None = None
        self._template: str | None = None
        self._find_unanswered()
        fault = self._find_prompts()
        self._find_stop()
        self._find_weights(fault)

    def _add(self, fault: Fault, evidence: str) -> None:
        adapters = tuple(name for name, base in self.facts.parents.items() if base == self.asked_for)
        fix = fix_of(fault, self.facts.kind, self.here.name, adapters, self.here.speaker.stop.text)
        self.findings.append(ServerFault(fault, evidence, fix))

    def _find_unanswered(self) -> None:
        missing = [one for one in self.compared if one.served.text is None]
        if not missing:
            return
        reason = getattr(missing[0].served.found, "reason", "")
        if lacks_images([one.served for one in self.compared], [one.question for one in self.compared]):
            self._add("no image support", f"the server refuses all {len(missing)} questions with an image ({reason})")
        else:
            self._add("not answered", f"{len(missing)} questions got no answer ({reason})")

    def _find_prompts(self) -> PromptFault | None:
        pairs = [one.prompt for one in self.compared if one.served.text is not None]
        fault = prompt_fault(pairs, self.here.bos, self.here.image_id)
        if fault is None:
            return None
        pair = next(pair for pair in pairs if pair.equal is False)
        counted = f"a prompt has {pair.count or len(pair.theirs or ())} tokens on the server and {len(pair.ours)} here"
        if fault in ("missing BOS", "doubled BOS"):
            self._add(fault, f"{counted}; {'ids' if pair.theirs is not None else 'counts'} of all prompts fit it")
        elif fault == "image tokens":
            self._add(fault, f"{counted}, and prompts without an image are equal")
        else:
            self._add(fault, counted + self._shown_difference(pair) + self._named_template())
        return fault

    def _shown_difference(self, pair: PromptPair) -> str:
        if pair.theirs is None:
            return ""
        place = max(0, first_difference(pair) - 1)
        texts = [self.here.tokenizer.decode(list(ids)[place : place + _AROUND]) for ids in (pair.theirs, pair.ours)]
        return f"; from token {place + 1} on it is {texts[0]!r} there and {texts[1]!r} here"

    def _named_template(self) -> str:
        """Name the template with which all the server's prompts can be built, if it is a known one."""
        answered = [one for one in self.compared if one.served.text is not None]
        for name, text in self.here.other_templates():
            for front, cut in (("", 0), (", without BOS", len(self.here.bos))):
                try:
                    ours = [self.here.prompt(one.question.messages, text)[cut:] for one in answered]
                except TemplateError:
                    break
                same = zip(answered, ours, strict=True)
                if all(PromptPair(ids, 0, one.prompt.count, one.prompt.theirs).equal for one, ids in same):
                    self._template = text
                    return f"; they are those of the template {name}{front}"
        return ""

    def _find_stop(self) -> None:
        different = [one for one in self.compared if one.served.text is not None and not one.equal]
        longer = [one for one in different if one.here and (one.served.text or "").startswith(one.here)]
        shorter = [one for one in different if one.served.text and one.here.startswith(one.served.text)]
        found = max(longer, shorter, key=len)
        if found and 2 * len(found) > len(different):
            what = "continue after" if found is longer else "end before"
            example = (found[0].served.text or "")[len(found[0].here) :][:40] if found is longer else ""
            shown = f", the first with {example!r}" if example else ""
            self._add("wrong stop", f"{len(found)} answers {what} the end of those here{shown}")

    def _prompt_as_served(self, one: ComparedAnswer, fault: PromptFault | None) -> Sequence[int]:
        ours, theirs, image = one.prompt.ours, one.prompt.theirs, self.here.image_id
        if fault is None or fault == "image tokens":
            return ours
        if theirs is not None and theirs.count(image) == list(ours).count(image):  # type: ignore[attr-defined]
            return theirs
        if fault == "missing BOS":
            return ours[len(self.here.bos) :]
        if fault == "doubled BOS":
            return [*self.here.bos, *ours]
        return self.here.prompt(one.question.messages, self._template) if self._template else ours

    def _find_weights(self, fault: PromptFault | None) -> None:
        """Look for a variant of the model that gives the server's answers, given the prompts as the server has them."""
        answered = [one for one in self.compared if one.served.text]
        if not answered:
            return
        prompts = {one.question.name: self._prompt_as_served(one, fault) for one in answered}
        shown = [one for one in answered if one.question.images()]
        written = [one for one in answered if not one.question.images()]
        fits = [(some, self._fit(some, prompts)) for some in (written, shown) if some]
        known = [(fit.difference, fit.answers) for _, fit in fits if fit.difference is not None]
        self.difference = sum(d * n for d, n in known) / sum(n for _, n in known) if known else None
        suspect = next(((some, fit) for some, fit in fits if self._is_suspect(some, fit, fault)), None)
        if suspect is None:
            return
        some, plain = suspect
        best = best_variant(self.here, some, [prompts[one.question.name] for one in some], plain)
        if best is not None and best.fault in _WEIGHTS and some is written and shown:
            # Answers without an image do not show whether the projector is the trained one.
            other = best_variant(self.here, shown, [prompts[one.question.name] for one in shown], fits[1][1])
            if other is not None and other.fault in _WEIGHTS:
                best, plain, some = other, fits[1][1], shown
        if best is not None:
            self._add(self._named(best), _evidence(best, plain, some))
        elif not all(one.equal for one in some) and (fault is None or self._is_known(fault)) and not self._stops():
            self._add_unexplained(some, plain)

    def _fit(self, some: Sequence[ComparedAnswer], prompts: Mapping[str, Sequence[int]]) -> Fit:
        return as_here(self.here, some, [prompts[one.question.name] for one in some])

    def _stops(self) -> bool:
        return any(finding.fault == "wrong stop" for finding in self.findings)

    def _is_suspect(self, some: Sequence[ComparedAnswer], plain: Fit, fault: PromptFault | None) -> bool:
        """Check whether answers are not those of the model here, given the prompts as the server has them."""
        if plain.difference is not None and plain.difference > NOISE:
            return True
        explained = fault is not None and plain.greedy == plain.answers
        return not (explained or self._stops() or all(one.equal for one in some))

    def _is_known(self, fault: PromptFault) -> bool:
        return fault in ("missing BOS", "doubled BOS") or self._template is not None

    def _named(self, best: Fit) -> Fault:
        """Name the fault of the best variant, by what the server reports about its models."""
        assert best.fault is not None
        if best.fault == "adapter not active" and self.asked_for in self.facts.parents.values():
            return "base served"
        if best.fault == "base served" and self.asked_for in self.facts.parents:
            return "adapter not active"
        return best.fault

    def _add_unexplained(self, answered: Sequence[ComparedAnswer], plain: Fit) -> None:
        gaps = [found.gap for one, found in zip(answered, plain.likelihoods, strict=True) if not one.equal]
        if max(gaps) <= _NEARLY:
            self._add(
                "rounding",
                f"where the answers diverge, the log-probabilities of the two tokens differ by "
                f"{max(gaps):.2f} nats at most",
            )
        else:
            self._add(
                "unexplained",
                f"where the answers diverge, the log-probabilities of the two tokens differ by up to "
                f"{max(gaps):.2f} nats",
            )


def _evidence(best: Fit, plain: Fit, some: Sequence[ComparedAnswer]) -> str:
    """Return how much better a variant explains some answers, all with an image or all without."""
    kind = "with" if some[0].question.images() else "without"
    text = (
        f"of {best.answers} answers to questions {kind} an image, {best.greedy} are those of {best.what} and "
        f"{plain.greedy} those of the model here"
    )
    if best.difference is not None and plain.difference is not None:
        text += (
            f"; log-probabilities differ from the server's by {best.difference:.3f} and {plain.difference:.3f} nats "
            "per token"
        )
    return text
