"""Many prompts at once: slots take them in turn and decode together."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from pipeline.errors import InputError
from pipeline.runtime.sampling import GREEDY, Sampling, choose_token
from pipeline.runtime.sessions.slots import SlotSession


def generate_batch(
    session: SlotSession,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_ids: Collection[int] = (),
    seed: int = 0,
) -> list[list[int]]:
    """Answer every prompt; a slot that has finished takes the next one.

    Each prompt has a generator of its own, seeded with `seed` and its number, so that an answer
    does not depend on which others are asked with it.

    Args:
        session: freshly opened, or all slots cleared.
        prompts: ids, at least one token each, of any lengths.
        max_new_tokens: most ids of an answer.
        sampling: how to choose.
        stop_ids: ids that end an answer, and are not part of it.
        seed: of all.

    Raises:
        InputError: a prompt is empty, or longer than a slot.
    """
    if not all(len(prompt) for prompt in prompts):
        raise InputError("A prompt is empty.", change="give at least one token each")
    answers: list[list[int]] = [[] for _ in prompts]
    generators = [np.random.default_rng([seed, number]) for number in range(len(prompts))]
    waiting = list(reversed(range(len(prompts))))
    running: dict[int, int] = {}

    def take(slot: int, logits: np.ndarray) -> None:
        """Choose a token for the prompt in a slot, or free the slot."""
        number = running[slot]
        history = [*prompts[number], *answers[number]]
        token = choose_token(logits, sampling, history, generators[number])
        if token not in stop_ids:
            answers[number].append(token)
        full = session.slot_length(slot) == session.max_length
        if token in stop_ids or full or len(answers[number]) == max_new_tokens:
            del running[slot]

    while (waiting or running) and max_new_tokens:
        for slot in range(session.slots):
            while waiting and slot not in running:
                running[slot] = waiting.pop()
                session.clear(slot)
                take(slot, session.prefill(slot, np.array(prompts[running[slot]], np.int64)))
        slots = sorted(running)
        if slots:
            tokens = [answers[running[slot]][-1] for slot in slots]
            for slot, logits in zip(slots, session.decode(slots, tokens), strict=True):
                take(slot, logits)
    return answers
