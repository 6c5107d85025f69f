"""Arrow arrays of any type, as arrays of types whose rows pyarrow can join and pick, and back.

pyarrow has no kernels that pick rows of views and of run-end encoded arrays, it joins only some dictionaries, and a
slice of views takes all their memory along. `plain` and `restored` go through nested types to where these lie.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

Dictionaries: TypeAlias = "Iterator[Joined] | None"
"""For each dictionary inside of a column, what joins those of its pieces; None where dictionaries stay as they are."""

_VIEW_BYTES = 16
"""Bytes of a string or binary view, beside its text."""


def said(kind: Any) -> str:
    """Return a type in words: equal where rows of both can be in one batch, whatever their fields' metadata are."""
    pa = pyarrow()
    if isinstance(kind, pa.BaseExtensionType):
        parameters = kind.__arrow_ext_serialize__() or b"" if hasattr(kind, "__arrow_ext_serialize__") else b""
        with_them = f" {parameters.decode(errors='backslashreplace')}" if parameters else ""
        return f"extension<{kind.extension_name}{with_them}: {said(kind.storage_type)}>"
    if pa.types.is_map(kind):
        ordered = ", keys_sorted" if kind.keys_sorted else ""
        return f"map<{said(kind.key_type)}, {said_field(kind.item_field, named=False)}{ordered}>"
    if pa.types.is_dictionary(kind):
        return f"dictionary<values={said(kind.value_type)}, indices={kind.index_type}, ordered={int(kind.ordered)}>"
    if pa.types.is_run_end_encoded(kind):
        return f"run_end_encoded<run_ends: {kind.run_end_type}, values: {said(kind.value_type)}>"
    name = str(kind).partition("<")[0]
    if _is_list(kind) or pa.types.is_fixed_size_list(kind):
        size = f"[{kind.list_size}]" if pa.types.is_fixed_size_list(kind) else ""
        return f"{name}<{said_field(kind.value_field, named=False)}>{size}"
    if pa.types.is_struct(kind):
        return f"struct<{', '.join(said_field(kind.field(number)) for number in range(kind.num_fields))}>"
    if pa.types.is_union(kind):
        fields = [said_field(kind.field(number)) for number in range(kind.num_fields)]
        return f"{name}<{', '.join(f'{each}={code}' for each, code in zip(fields, kind.type_codes, strict=True))}>"
    return str(kind)


def said_field(field: Any, *, named: bool = True) -> str:
    """Return a field in words, as `said` does; how a list calls its elements does not matter."""
    name = f"{field.name}: " if named else ""
    return f"{name}{said(field.type)}{'' if field.nullable else ' not null'}"


def is_plain(kind: Any, *, dictionaries: bool = False) -> bool:
    """Whether `plain` leaves arrays of a type as they are; `dictionaries`: where it is to take those apart."""
    pa = pyarrow()
    if _is_view(kind) or pa.types.is_run_end_encoded(kind) or _is_list_view(kind):
        return False
    if pa.types.is_dictionary(kind):
        return not dictionaries
    return all(is_plain(child, dictionaries=dictionaries) for child in _children(kind))


def is_simple(kind: Any) -> bool:
    """Whether a type has no other inside, and pyarrow is known to do with it all that is wanted here."""
    return not _children(kind) and is_plain(kind, dictionaries=True)


def joins_cheaply(kind: Any) -> bool:
    """Whether pyarrow joins arrays of a type: dictionaries may not fit together, and unions take all theirs along."""
    pa = pyarrow()
    if pa.types.is_dictionary(kind) or pa.types.is_union(kind):
        return False
    return all(joins_cheaply(child) for child in _children(kind))


def plain(array: Any, dictionaries: Dictionaries = None) -> Any:
    """Return the rows of an array as one whose type pyarrow can join and pick rows of. A slice takes only its rows.

    Raises:
        TypeError: there is something inside that cannot be turned into such.
    """
    pa, kind = pyarrow(), array.type
    if is_plain(kind, dictionaries=dictionaries is not None):
        return array
    if isinstance(kind, pa.BaseExtensionType):
        return plain(array.storage, dictionaries)
    if pa.types.is_dictionary(kind):
        assert dictionaries is not None
        return next(dictionaries).add(array)
    if _is_view(kind):
        return array.cast(pa.large_string() if kind == pa.string_view() else pa.large_binary())
    if pa.types.is_run_end_encoded(kind):
        return plain(pa.compute.run_end_decode(array), dictionaries)
    if pa.types.is_struct(kind):
        parts = [plain(array.field(number), dictionaries) for number in range(kind.num_fields)]
        return pa.StructArray.from_arrays(parts, list(map(str, range(len(parts)))), mask=array.is_null())
    if pa.types.is_fixed_size_list(kind):
        values = array.values.slice(array.offset * kind.list_size, len(array) * kind.list_size)
        return pa.FixedSizeListArray.from_arrays(plain(values, dictionaries), kind.list_size, mask=array.is_null())
    if _is_list_view(kind):
        return _listed(array, dictionaries)
    if _is_list(kind) or pa.types.is_map(kind):
        offsets, values = _elements(array)
        return pa.LargeListArray.from_arrays(offsets, plain(values, dictionaries), mask=array.is_null())
    raise TypeError(f"{kind} has a type inside that cannot be sent there")


def restored(array: Any, kind: Any, dictionaries: Dictionaries = None) -> Any:
    """Return what `plain` made of an array of a type, or of several that were joined, as that type again.

    Raises:
        ValueError: dictionaries that were joined have more values than their index type counts.
    """
    pa = pyarrow()
    if is_plain(kind, dictionaries=dictionaries is not None):
        return array
    if isinstance(kind, pa.BaseExtensionType):
        return kind.wrap_array(restored(array, kind.storage_type, dictionaries))
    if pa.types.is_dictionary(kind):
        assert dictionaries is not None
        return next(dictionaries).restore(array, kind)
    if _is_view(kind):
        return array.cast(kind)
    if pa.types.is_run_end_encoded(kind):
        return pa.compute.run_end_encode(restored(array, kind.value_type, dictionaries), kind.run_end_type)
    mask = array.is_null()
    if pa.types.is_struct(kind):
        fields = [kind.field(number) for number in range(kind.num_fields)]
        parts = [restored(array.field(number), each.type, dictionaries) for number, each in enumerate(fields)]
        return pa.StructArray.from_arrays(parts, fields=fields, mask=mask)
    if pa.types.is_fixed_size_list(kind):
        values = restored(array.values, kind.value_type, dictionaries)
        return pa.FixedSizeListArray.from_arrays(values, type=kind, mask=mask)
    offsets, values = _elements(array)
    if pa.types.is_map(kind):
        keys = restored(values.field(0), kind.key_type, dictionaries)
        items = restored(values.field(1), kind.item_type, dictionaries)
        return pa.MapArray.from_arrays(offsets.cast(pa.int32()), keys, items, kind, mask=mask)
    values = restored(values, kind.value_type, dictionaries)
    wide = pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind)
    index = pa.int64() if wide else pa.int32()
    if not _is_list_view(kind):
        make = pa.LargeListArray if wide else pa.ListArray
        return make.from_arrays(offsets.cast(index), values, type=kind, mask=mask)
    make = pa.LargeListViewArray if wide else pa.ListViewArray
    lengths = pa.compute.subtract(offsets[1:], offsets[:-1])
    return make.from_arrays(offsets[:-1].cast(index), lengths.cast(index), values, type=kind, mask=mask)


class Joined:
    """The dictionaries of one column's pieces, or of what lies inside of it, and the rows' places in them."""

    def __init__(self) -> None:
        self._dictionaries: list[Any] = []
        self._starts = [0]

    def add(self, array: Any) -> Any:
        """Return the rows' places among the values of all dictionaries that were added, this one's included."""
        pa, dictionary = pyarrow(), array.dictionary
        number = next((n for n, other in enumerate(self._dictionaries) if _equal(other, dictionary)), None)
        if number is None:
            number = len(self._dictionaries)
            self._dictionaries.append(dictionary)
            self._starts.append(self._starts[-1] + len(dictionary))
        places = array.indices.cast(pa.int64())
        if len(places):
            least, most = pa.compute.min_max(places).values()
            if least.is_valid and not 0 <= least.as_py() <= most.as_py() < len(dictionary):
                # Whatever is there belongs to no row: it is inside of a null.
                outside = pa.compute.or_(pa.compute.less(places, 0), pa.compute.greater_equal(places, len(dictionary)))
                places = pa.compute.if_else(outside, None, places)
        return pa.compute.add(places, self._starts[number])

    def restore(self, places: Any, kind: Any) -> Any:
        """Return rows as an array of a dictionary type: with the dictionary that all have, or one of what they use."""
        pa = pyarrow()
        if len(self._dictionaries) > 1:
            choose = self._largest if kind.ordered else self._used
            places, dictionary = choose(places)
        else:
            dictionary = self._dictionaries[0] if self._dictionaries else pa.array([], kind.value_type)
        most = int(np.iinfo(kind.index_type.to_pandas_dtype()).max) + 1
        if len(dictionary) > most:
            raise ValueError(
                f"rows of one batch have {len(dictionary)} values in different dictionaries, and {kind.index_type} "
                f"indices count {most}; put dictionaries with wider indices, or the same dictionary everywhere"
            )
        return pa.DictionaryArray.from_arrays(places.cast(kind.index_type), dictionary, ordered=kind.ordered)

    def _used(self, places: Any) -> tuple[Any, Any]:
        """Return the values that rows use, each once where that can be found out, and the rows' places among these."""
        pa = pyarrow()
        kind, values = self._dictionaries[0].type, pa.concat_arrays([plain(each) for each in self._dictionaries])
        used, back = np.unique(places.drop_null().to_numpy(), return_inverse=True)
        values = values.take(pa.array(used))
        try:
            encoded = values.dictionary_encode(null_encoding="encode")
        except pa.ArrowNotImplementedError:  # of lists, say: the same value may then be there twice, as Arrow allows
            among = np.arange(len(used))
        else:
            among, values = encoded.indices.to_numpy(), encoded.dictionary
        mask = places.is_null().to_numpy(zero_copy_only=False)
        fresh = np.zeros(len(places), np.int64)
        fresh[~mask] = among[back]
        return pa.array(fresh, mask=mask), restored(values, kind)

    def _largest(self, places: Any) -> tuple[Any, Any]:
        """Return the largest of dictionaries whose order has a meaning, and the rows' places in it."""
        pa = pyarrow()
        largest = max(self._dictionaries, key=len)
        among = []
        for each in self._dictionaries:
            found = pa.compute.index_in(plain(each), value_set=plain(largest))
            at = found.fill_null(-1).to_numpy()
            if found.null_count or (np.diff(at) <= 0).any():
                raise ValueError(
                    f"rows of one batch have ordered dictionaries that differ: {each.to_pylist()[:8]} and "
                    f"{largest.to_pylist()[:8]}; put dictionaries of which one has all others' values in their order"
                )
            among.append(at.astype(np.int64))
        return pa.array(np.concatenate(among)).take(places), largest


def dictionaries_of(array: Any) -> Iterator[Any]:
    """Yield the dictionaries inside of an array."""
    pa, kind = pyarrow(), array.type
    if is_plain(kind, dictionaries=True):
        return
    if isinstance(kind, pa.BaseExtensionType):
        yield from dictionaries_of(array.storage)
    elif pa.types.is_dictionary(kind):
        yield array.dictionary
    elif pa.types.is_struct(kind) or pa.types.is_union(kind):
        for number in range(kind.num_fields):
            yield from dictionaries_of(array.field(number))
    elif pa.types.is_map(kind):
        yield from dictionaries_of(array.keys)
        yield from dictionaries_of(array.items)
    elif hasattr(array, "values"):
        yield from dictionaries_of(array.values)


def size_of(array: Any) -> int:
    """Return about how many bytes the rows of an array take as `plain` makes them, without dictionaries."""
    pa, kind = pyarrow(), array.type
    if is_plain(kind, dictionaries=True):
        return int(array.nbytes)
    if isinstance(kind, pa.BaseExtensionType):
        return size_of(array.storage)
    if pa.types.is_dictionary(kind):
        return int(array.indices.nbytes)
    if _is_view(kind):
        lengths = np.frombuffer(array.buffers()[1] or b"", np.int32)[4 * array.offset :: 4][: len(array)]
        return _VIEW_BYTES * len(array) + int(lengths.sum(dtype=np.int64))
    if pa.types.is_struct(kind):
        return sum(size_of(array.field(number)) for number in range(kind.num_fields))
    if pa.types.is_run_end_encoded(kind):
        return _share(size_of(array.values), len(array.values), len(array))
    if pa.types.is_fixed_size_list(kind):
        return _share(size_of(array.values), len(array.values), len(array) * kind.list_size)
    if _is_list_view(kind):
        elements = pa.compute.sum(array.sizes).as_py() or 0
        return 8 * len(array) + _share(size_of(array.values), len(array.values), elements)
    if _is_list(kind) or pa.types.is_map(kind):
        return 8 * len(array) + size_of(_elements(array)[1])
    return int(array.nbytes)


@cache
def pyarrow() -> Any:
    """Return pyarrow, with what this package needs of it."""
    importlib.import_module("pyarrow.ipc")
    importlib.import_module("pyarrow.compute")
    return importlib.import_module("pyarrow")


def _children(kind: Any) -> list[Any]:
    pa = pyarrow()
    if isinstance(kind, pa.BaseExtensionType):
        return [kind.storage_type]
    if pa.types.is_map(kind):
        return [kind.key_type, kind.item_type]
    return [kind.field(number).type for number in range(kind.num_fields)]


def _is_view(kind: Any) -> bool:
    pa = pyarrow()
    return bool(pa.types.is_string_view(kind) or pa.types.is_binary_view(kind))


def _is_list_view(kind: Any) -> bool:
    pa = pyarrow()
    return bool(pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind))


def _is_list(kind: Any) -> bool:
    pa = pyarrow()
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind)) or _is_list_view(kind)


def _equal(one: Any, other: Any) -> bool:
    return len(one) == len(other) and bool(one.equals(other))


def _elements(array: Any) -> tuple[Any, Any]:
    """Return the offsets of lists or maps, from 0 on, and the elements that lie between the first and the last."""
    pa = pyarrow()
    offsets = array.offsets.to_numpy().astype(np.int64)
    return pa.array(offsets - offsets[0]), array.values.slice(offsets[0], offsets[-1] - offsets[0])


def _listed(array: Any, dictionaries: Dictionaries) -> Any:
    """Return list views, which may lie in any order and overlap, as lists."""
    pa = pyarrow()
    starts, lengths = (each.to_numpy().astype(np.int64) for each in (array.offsets, array.sizes))
    lengths = np.where(array.is_null().to_numpy(zero_copy_only=False), 0, lengths)
    starts = np.where(lengths > 0, starts, 0)
    first, last = starts[lengths > 0].min(initial=len(array.values)), (starts + lengths).max(initial=0)
    ends = np.cumsum(lengths)
    places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths) - first, lengths)
    values = plain(array.values.slice(first, max(0, last - first)), dictionaries).take(pa.array(places))
    return pa.LargeListArray.from_arrays(pa.array(np.append(0, ends)), values, mask=array.is_null())


def _share(size: int, count: int, wanted: int) -> int:
    return -(-size * wanted // count) if count else 0
