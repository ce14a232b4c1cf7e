"""States inside of states: structs, queues of them, trees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

from mig.savevm.vmstate import access, elements
from mig.savevm.vmstate.describe import JsonObject, entry
from mig.savevm.vmstate.description import Description
from mig.savevm.vmstate.elements import Element
from mig.savevm.vmstate.fields import Field
from mig.savevm.vmstate.limits import MAX_ELEMENTS
from mig.savevm.vmstate.streams import StateReader, StateWriter


class StructElement(Element):
    """A state with a description of its own.

    version: of it that is written and expected; None: the description's, as usual
    """

    def __init__(self, description: Description, version: int | None = None) -> None:
        self.description = description
        self._version = version
        self.nested = version is None
        self.type_name = "struct" if self.nested else "vstruct"

    @property
    def alike(self) -> bool:
        """Whether it always looks the same; QEMU takes that for granted of a vstruct."""
        return self.description.alike or not self.nested

    def put(self, out: StateWriter, value: Any, body: JsonObject) -> None:
        """Write the state."""
        if value is None:
            raise out.error("there is no state: it is None")
        self.description.put(out, value, body, self._version)

    def get(self, source: StateReader, old: Any, parent: Any) -> Any:
        """Read into the state that is there, or into an empty one."""
        state = self.description.blank(parent) if old is None or old is access.MISSING else old
        version = self.description.version if self._version is None else self._version
        self.description.get(source, state, version)
        return state


class Single(Field):
    """One value of an Element, which may be one of your own."""

    def __init__(self, name: str, element: Element, **options: Any) -> None:
        super().__init__(name, **options)
        self._element = element

    @property
    def alike(self) -> bool:
        """Whether it looks the same in all elements of an array."""
        return super().alike and self._element.alike

    def save(self, out: StateWriter, state: Any, name: str, described: list[JsonObject]) -> None:
        """Write the value."""
        body, start, element = JsonObject(), out.nbytes, self._element
        element.put(out, self.value(out, state), body)
        nbytes = out.nbytes - start
        described.append(entry(name, element.type_name, body, nbytes, nested=element.nested))

    def load(self, source: StateReader, state: Any) -> None:
        """Read the value."""
        at = source.reader.offset
        old = access.get(state, self.attribute)
        new = self._element.get(source, old, state)
        if new is not old:
            self.store(source, state, new, at)


class Struct(Single):
    """A state in the state, which is loaded into the object that is there, if there is one.

    QEMU's pointer to a struct is the same.

    version: of the struct to write and to expect, where that is not the newest (VMSTATE_VSTRUCT)
    """

    def __init__(
        self,
        name: str,
        description: Description,
        *,
        version: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(name, StructElement(description, version), **options)


class Temporary(Field):
    """A state that exists only for the stream (VMSTATE_WITH_TMP).

    make: called with the state, returns another one that knows it. The description's pre_save
          fills it in from there, its post_load takes what was loaded back
    """

    def __init__(
        self,
        description: Description,
        make: Callable[[Any], Any],
        *,
        name: str = "tmp",
        **options: Any,
    ) -> None:
        super().__init__(name, **options)
        self._description = description
        self._make = make

    def save(self, out: StateWriter, state: Any, name: str, described: list[JsonObject]) -> None:
        """Write what is made."""
        body, start = JsonObject(), out.nbytes
        self._description.put(out, self._make(state), body)
        described.append(entry(name, "tmp", body, out.nbytes - start))

    def load(self, source: StateReader, state: Any) -> None:
        """Read into what is made."""
        self._description.get(source, self._make(state), self._description.version)


class _Chain(Field):
    """States one after the other, each behind a byte 1; a byte 0 ends them.

    maximum: elements at most
    """

    def __init__(
        self,
        name: str,
        description: Description,
        *,
        maximum: int = MAX_ELEMENTS,
        **options: Any,
    ) -> None:
        super().__init__(name, **options)
        self._description = description
        self._maximum = maximum

    def _put_key(self, out: StateWriter, key: int, body: JsonObject) -> None:
        """Write what is between the byte 1 and the state."""

    def _get_key(self, source: StateReader, number: int) -> int:
        """Read that of the element of this number."""
        return number

    def _put_each(
        self, out: StateWriter, states: Iterable[tuple[int, Any]], body: JsonObject
    ) -> None:
        for key, state in states:
            out.put(b"\x01")
            with out.at(f"[{key!r}]"):
                self._put_key(out, key, body)
                self._description.put(out, state, body)
        out.put(b"\x00")

    def _get_each(
        self, source: StateReader, parent: Any, maximum: int, told: str
    ) -> list[tuple[int, Any]]:
        """Return the keys and states; told: the maximum in words."""
        states: list[tuple[int, Any]] = []
        while source.read(1) != b"\x00":
            if len(states) == maximum:
                raise source.error(f"more than {told}")
            key = self._get_key(source, len(states))
            with source.at(f"[{key}]"):
                state = self._description.blank(parent)
                self._description.get(source, state, self._description.version)
            states.append((key, state))
        return states


class _Linked(_Chain):
    type_name: ClassVar[str]

    def save(self, out: StateWriter, state: Any, name: str, described: list[JsonObject]) -> None:
        """Write all elements."""
        body, start, values = JsonObject(), out.nbytes, self.value(out, state)
        if not isinstance(values, Iterable):
            raise out.error(f"{access.shown(values)} is no list")
        self._put_each(out, self._numbered(out, values), body)
        described.append(entry(name, self.type_name, body, out.nbytes - start))

    def _numbered(self, out: StateWriter, values: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        for i, value in enumerate(values):
            if i == self._maximum:
                raise out.error(f"more than {self._maximum} elements")
            yield i, value

    def load(self, source: StateReader, state: Any) -> None:
        """Read the elements, in place of all that were there."""
        at = source.reader.offset
        states = self._get_each(source, state, self._maximum, f"{self._maximum} elements")
        values = [value for _, value in states]
        self.fill(source, state, at, lambda old: access.refill(old, values))


class TailQueue(_Linked):
    """A QTAILQ: a list or deque of states.

    maximum: elements at most
    """

    type_name = "qtailq"


class LinkedList(_Linked):
    """A QLIST: a list or deque of states.

    maximum: elements at most
    """

    type_name = "qlist"


class Tree(_Chain):
    """A GTree whose keys are numbers: a dict of states by 64-bit unsigned numbers.

    maximum: elements at most
    """

    def save(self, out: StateWriter, state: Any, name: str, described: list[JsonObject]) -> None:
        """Write all elements, by ascending key."""
        body, start, tree = JsonObject(), out.nbytes, self.value(out, state)
        if not isinstance(tree, Mapping) or not all(isinstance(key, int) for key in tree):
            raise out.error(f"{access.shown(tree)} is no dict by numbers")
        if len(tree) > self._maximum:
            raise out.error(f"more than {self._maximum} elements")
        elements.UINT32.put(out, len(tree), body)
        self._put_each(out, ((key, tree[key]) for key in sorted(tree)), body)
        described.append(entry(name, "gtree", body, out.nbytes - start))

    def load(self, source: StateReader, state: Any) -> None:
        """Read the elements, in place of all that were there."""
        at = source.reader.offset
        count = int.from_bytes(source.read(4), "big")
        if count > self._maximum:
            raise source.error(f"{count} elements: {self._maximum} can be", offset=at)
        told = f"the {count} elements that were announced"
        states = self._get_each(source, state, count, told)
        if len(states) != count:
            raise source.error(f"{len(states)} elements, {count} were announced")
        self.store(source, state, dict(states), at)

    def _put_key(self, out: StateWriter, key: int, body: JsonObject) -> None:
        elements.UINT64.put(out, key, body)

    def _get_key(self, source: StateReader, number: int) -> int:
        return int.from_bytes(source.read(8), "big")
