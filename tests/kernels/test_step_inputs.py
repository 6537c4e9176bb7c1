"""Step preparation with PyTorch's operators against its slow truth, and what packing refuses."""

from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmd_kernels.step_inputs import (
    BLOCK_TABLES,
    TOKEN_IDS,
    NewEntries,
    SequenceTables,
    StepInputs,
    allocate_inputs,
    allocate_tables,
    append_token_ids,
    pack_step,
    reference,
    step_inputs,
    write_differences,
)
from llmd_kernels.step_inputs.packing import MAX_SEGMENT

BLOCK_SIZE = 4
MAX_LEN = 40
NUM_PLACES = 6


@dataclass(frozen=True)
class Step:
    rows: list[tuple[int, int, int, int, int]]  # place, start, num_tokens, num_prompt_logits, samples
    max_rows: int
    max_tokens: int
    max_logits: int

    def buffers(self) -> StepInputs:
        """Full of what an earlier step may have left."""
        inputs = allocate_inputs(self.max_rows, self.max_tokens, self.max_logits, device=torch.device("cpu"))
        for field in fields(inputs):
            getattr(inputs, field.name).fill_(77)
        return inputs

    def packed(self, new_entries: list[NewEntries] | None = None) -> torch.Tensor:
        return torch.from_numpy(pack_step(self.rows, new_entries or [], max_rows=self.max_rows))


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Any rows, with room to spare or none."""
    places = draw(st.lists(st.integers(0, NUM_PLACES - 1), unique=True, max_size=NUM_PLACES))
    rows = []
    for place in places:
        start = draw(st.integers(0, MAX_LEN - 1))
        num_tokens = draw(st.integers(1, min(9, MAX_LEN - start)))
        rows.append((place, start, num_tokens, draw(st.integers(0, num_tokens - 1)), draw(st.integers(0, 1))))
    spare = st.integers(0, 5)
    num_tokens, num_logits = sum(row[2] for row in rows), sum(row[3] + row[4] for row in rows)
    return Step(rows, max(1, len(rows) + draw(spare)), num_tokens + draw(spare), num_logits + draw(spare))


def random_tables() -> SequenceTables:
    tables = allocate_tables(NUM_PLACES, MAX_LEN, block_size=BLOCK_SIZE, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for table in (tables.token_ids, tables.block_tables):
        table.copy_(torch.randint(0, 1000, table.shape, generator=generator))
    return tables


def assert_same(inputs: StepInputs, truth: StepInputs) -> None:
    for field in fields(inputs):
        assert torch.equal(getattr(inputs, field.name), getattr(truth, field.name)), field.name


@given(steps())
def test_inputs_are_those_of_the_reference(step: Step) -> None:
    tables = random_tables()
    inputs, truth = step.buffers(), step.buffers()
    step_inputs(step.packed(), tables, inputs, block_size=BLOCK_SIZE)
    reference.step_inputs(step.packed(), tables, truth, block_size=BLOCK_SIZE)
    assert_same(inputs, truth)


def test_the_reference_says_what_a_step_is() -> None:
    """A prompt whose probabilities are wanted, a sequence that decodes, a chunk that draws nothing."""
    tables = random_tables()
    step = Step([(4, 0, 3, 2, 1), (1, 9, 1, 0, 1), (2, 6, 3, 0, 0)], max_rows=4, max_tokens=8, max_logits=5)
    truth = step.buffers()
    reference.step_inputs(step.packed(), tables, truth, block_size=BLOCK_SIZE)
    ids, blocks = tables.token_ids.tolist(), tables.block_tables.tolist()
    assert truth.token_ids.tolist() == [*ids[4][:3], ids[1][9], *ids[2][6:9], 0]
    assert truth.positions.tolist() == [0, 1, 2, 9, 6, 7, 8, 0]
    slots = [4 * blocks[4][0] + offset for offset in range(3)] + [4 * blocks[1][2] + 1]
    slots += [4 * blocks[2][1] + 2, 4 * blocks[2][1] + 3, 4 * blocks[2][2], -1]
    assert truth.slots.tolist() == slots
    assert truth.query_starts.tolist() == [0, 3, 4, 7, 7]
    assert truth.kv_lens.tolist() == [3, 10, 9, 0]
    assert truth.places.tolist() == [4, 1, 2, 0]
    assert truth.logit_rows.tolist() == [0, 1, 2, 3, 0]
    assert truth.sampled_logits.tolist() == [2, 3, 0, 0]
    assert truth.sampled_places.tolist() == [4, 1, -1, -1]
    assert truth.sampled_lens.tolist() == [3, 10, 0, 0]


@given(st.data())
def test_differences_are_written_where_they_belong(data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, NUM_PLACES - 1), unique=True))
    new_entries = []
    for place in places:
        for table, width in ((TOKEN_IDS, MAX_LEN), (BLOCK_TABLES, MAX_LEN // BLOCK_SIZE)):
            first = data.draw(st.integers(0, width))
            values = data.draw(st.lists(st.integers(0, 2**31 - 1), max_size=width - first))
            new_entries.append(NewEntries(table, place, first, values))
    max_rows = data.draw(st.integers(1, 3))
    step = Step([], max_rows, max_tokens=0, max_logits=0).packed(new_entries)
    tables, truth, expected = random_tables(), random_tables(), random_tables()
    write_differences(step, tables, max_rows=max_rows)
    reference.write_differences(step, truth, max_rows=max_rows)
    for new in new_entries:
        table = expected.token_ids if new.table == TOKEN_IDS else expected.block_tables
        table[new.place, new.first : new.first + len(new.values)] = torch.tensor(new.values, dtype=torch.int32)
    for found in (tables, truth):
        assert torch.equal(found.token_ids, expected.token_ids)
        assert torch.equal(found.block_tables, expected.block_tables)


def test_a_long_prompt_is_several_segments() -> None:
    tables = allocate_tables(2, 5 * MAX_SEGMENT, block_size=BLOCK_SIZE, device=torch.device("cpu"))
    prompt = np.arange(2 * MAX_SEGMENT + 5, dtype=np.int32)
    step = Step([], max_rows=2, max_tokens=0, max_logits=0).packed([NewEntries(TOKEN_IDS, 1, 3, prompt)])
    write_differences(step, tables, max_rows=2)
    assert torch.equal(tables.token_ids[1, 3 : 3 + len(prompt)], torch.from_numpy(prompt))
    assert (tables.token_ids[0] == 0).all()


@given(steps(), st.integers(0, 3))
def test_drawn_tokens_follow_their_sequences(step: Step, num_more: int) -> None:
    """More may be drawn than is kept: a captured step always draws for all its rows."""
    tables, truth = random_tables(), random_tables()
    inputs = step.buffers()
    step_inputs(step.packed(), tables, inputs, block_size=BLOCK_SIZE)
    num_drawn = min(step.max_rows, sum(row[4] for row in step.rows) + num_more)
    drawn = torch.arange(5000, 5000 + num_drawn)
    append_token_ids(drawn, tables, inputs)
    reference.append_token_ids(drawn, truth, inputs)
    assert torch.equal(tables.token_ids, truth.token_ids)
    sampling = [(place, start + num_tokens) for place, start, num_tokens, _, samples in step.rows if samples]
    for token_id, (place, position) in zip(drawn.tolist(), sampling, strict=False):
        assert position == MAX_LEN or tables.token_ids[place, position] == token_id


def test_what_does_not_fit_is_refused() -> None:
    step = Step([(0, 0, 1, 0, 1), (1, 0, 1, 0, 1)], max_rows=1, max_tokens=2, max_logits=2)
    with pytest.raises(ValueError, match="2 rows in a step of at most 1"):
        step.packed()


def test_a_step_may_stand_behind_other_numbers() -> None:
    rows, new_entries = [(0, 0, 3, 0, 1)], [NewEntries(TOKEN_IDS, 0, 0, [1, 2, 3])]
    alone = pack_step(rows, new_entries, max_rows=2)
    assert len(alone) % 4 == 0
    assert pack_step(rows, new_entries, max_rows=2, num_before=8)[8:].tolist() == alone.tolist()
