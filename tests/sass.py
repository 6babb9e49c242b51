"""What the assembler made of a kernel: its loops, and registers that are read on a path on which nothing wrote them.

The latter is no idle fear: ptxas 12.8 (triton 3.6) moved half of a descriptor's address arithmetic onto one of two paths
that met again, and warpgroups then multiplied what an undefined register pointed at. No warning, no crash.
"""

import re
from dataclasses import dataclass, field

# instructions that do not begin with U and yet write a uniform register
WRITES_UNIFORM = {"R2UR", "S2UR", "VOTEU", "REDUX", "CS2UR"}


@dataclass
class Instruction:
    text: str
    predicated: bool
    opcode: str
    operands: str
    successors: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


def parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions of an nvdisasm listing, and the labels among them."""
    code, labels = [], {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][^\s;]*)\s*(.*?)\s*;?\s*$", line):
            predicate, opcode, operands = match.groups()
            code.append(Instruction(f"{opcode} {operands}", predicate is not None, opcode, operands))
    for i, instruction in enumerate(code):
        if instruction.name in ("BRA", "BRX"):  # BRX: through a table, which the listing spells out
            instruction.successors += [labels[target] for target in re.findall(r"\.L_\w+", instruction.operands)]
        goes_on = instruction.name not in ("BRA", "BRX", "EXIT", "RET") or instruction.predicated
        goes_on |= instruction.name == "BRA" and bool(re.match(r"!?U?P\d", instruction.operands))
        if goes_on and i + 1 < len(code):
            instruction.successors.append(i + 1)
    return code, labels


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The natural loops: for each branch back to an instruction that every path to the branch has passed, what lies on a
    way from there to the branch. (A branch back from code that the assembler put out of line closes no loop.)"""
    predecessors = [[] for _ in code]
    for i, instruction in enumerate(code):
        for successor in instruction.successors:
            predecessors[successor].append(i)
    dominator = _immediate_dominators(code, predecessors)
    bodies: dict[int, set[int]] = {}
    for branch, instruction in enumerate(code):
        for head in instruction.successors:
            if head > branch or not _dominates(dominator, head, branch):
                continue
            body = bodies.setdefault(head, {head})
            work = [branch]
            while work:
                i = work.pop()
                if i not in body:
                    body.add(i)
                    work.extend(predecessors[i])
    return [[code[i] for i in sorted(body)] for body in bodies.values()]


def _immediate_dominators(code, predecessors) -> list[int | None]:
    """Cooper, Harvey and Kennedy: A Simple, Fast Dominance Algorithm (2001)."""
    order, seen, work = [], set(), [(0, iter(code[0].successors))]
    seen.add(0)
    while work:  # depth first, children before parents
        node, rest = work[-1]
        for successor in rest:
            if successor not in seen:
                seen.add(successor)
                work.append((successor, iter(code[successor].successors)))
                break
        else:
            order.append(node)
            work.pop()
    rank = {node: i for i, node in enumerate(order)}
    dominator: list[int | None] = [None] * len(code)
    dominator[0] = 0
    changed = True
    while changed:
        changed = False
        for node in reversed(order[:-1]):
            known = [p for p in predecessors[node] if p in rank and dominator[p] is not None]
            best = known[0]
            for other in known[1:]:
                while best != other:
                    while rank[best] < rank[other]:
                        best = dominator[best]
                    while rank[other] < rank[best]:
                        other = dominator[other]
            if dominator[node] != best:
                dominator[node] = best
                changed = True
    return dominator


def _dominates(dominator: list[int | None], head: int, node: int) -> bool:
    while node not in (head, 0) and dominator[node] is not None:
        node = dominator[node]
    return node == head


def undefined_uniform_reads(code: list[Instruction]) -> list[str]:
    """Reads of a uniform register that some path from the entry reaches without writing it.

    A predicated write counts as a write, as its reads carry the same predicate.
    """
    accesses = [_uniform_accesses(instruction) for instruction in code]
    written: list[set[int] | None] = [None] * len(code)  # before each instruction, on every path; None: not reached
    written[0] = set()
    work = [0]
    while work:
        i = work.pop()
        after = written[i] | accesses[i][0]
        for successor in code[i].successors:
            met = after if written[successor] is None else written[successor] & after
            if met != written[successor]:
                written[successor] = set(met)
                work.append(successor)
    return [
        f"{i}: UR{sorted(missing)} in {code[i].text}"
        for i, (_, reads) in enumerate(accesses)
        if written[i] is not None and (missing := reads - written[i])
    ]


def _uniform_accesses(instruction: Instruction) -> tuple[set[int], set[int]]:
    """The uniform registers that an instruction writes and reads."""
    operands, writes, reads = instruction.operands, set(), set()
    if descriptors := re.search(r"gdesc\[UR(\d+)\]", operands):  # of A and B, or, with A in registers, of B alone
        first = int(descriptors[1])
        a_in_registers = re.match(r"R\d+(\.reuse)?, R\d+(\.reuse)?, gdesc", operands)
        reads |= set(range(first + (2 if a_in_registers else 0), first + 4))
        operands = operands.replace(descriptors[0], "")
    operands = re.sub(r"^!?U?P\w+, ", "", operands)  # a predicate that is written beside it
    destination, _, sources = operands.partition(",")
    wide = 2 if re.search(r"\.(64|WIDE)\b", instruction.opcode) else 1
    target = re.fullmatch(r"UR(\d+)", destination.strip())
    if target and (instruction.name.startswith("U") or instruction.name in WRITES_UNIFORM):
        writes |= set(range(int(target[1]), int(target[1]) + wide))
    else:
        sources = operands
    for register in map(int, re.findall(r"\bUR(\d+)\b", sources)):
        reads |= set(range(register, register + (2 if instruction.opcode.startswith("UIADD3.64") else 1)))
    return writes, reads
