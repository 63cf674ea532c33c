"""Positions that several layers share, and share again in copies of them.

Keras writes an archive in one scope, in which it finds out what is shared. Everything
else that goes by configs (`clone_model`, `from_config`, JSON, HDF5) copies one layer
after another and knows nothing of its fellows. So the config of a shared position also
says which position that is, and in which of its places. Copies of different places,
made one after another, hold one position; a place that comes again begins the next
copy.
"""

import json
import threading
import uuid
import weakref
from collections.abc import Callable
from typing import Any

import keras

from keras_mha._keras import is_called_by_itself, is_in_sharing_scope, note_shared

_KEY = "shared_as"


class _Copies(threading.local):
    """The newest copy of each shared position, and the places that it has."""

    def __init__(self):
        self.newest = weakref.WeakValueDictionary()
        self.places = weakref.WeakKeyDictionary()


_copies = _Copies()


class Shareable(keras.layers.Layer):
    """Base of the layers that several others may hold."""

    axes = 1
    """Along how many axes tokens stand."""

    window: tuple[int, ...] | None = None
    """The sizes of the grid that tokens stand in, if it has any."""

    _shared_as = None  # once it is shared; all its copies have the same
    _places = 0
    _has_place_of_its_own = False

    def take_place(self) -> int:
        """Returns the place of one more layer that holds this one."""
        self._places += 1
        self._notice_sharing()
        return self._places - 1

    def config_in(self, place: int) -> Any:
        """Returns what the config of the layer in this place holds of this one."""
        if is_in_sharing_scope():
            self._tell_keras()
            return self  # Keras gives all who share it the same one again
        config = keras.saving.serialize_keras_object(self)
        config["config"].pop(_KEY, None)
        return {**config, **self._mark(place)}

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for `from_config`."""
        config = super().get_config()
        if is_called_by_itself(self):
            self._has_place_of_its_own = True
            self._notice_sharing()
        if is_in_sharing_scope():
            self._tell_keras()
        elif self._has_place_of_its_own:
            config |= self._mark(None)
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Shareable":
        """Makes the layer that `get_config` described, or joins its fellows' copy."""
        mark, config = config.get(_KEY), _without_mark(config)
        make = super().from_config
        if mark is None:
            return make(config)
        described = {"class_name": cls.__name__, "config": config}
        copy = _copy(mark, described, lambda: make(config))
        copy._has_place_of_its_own = True
        return copy

    def _notice_sharing(self) -> None:
        is_shared = self._places + self._has_place_of_its_own > 1
        if is_shared and self._shared_as is None:
            self._shared_as = uuid.uuid4().hex

    def _mark(self, place: int | None) -> dict[str, Any]:
        if self._shared_as is None:
            return {}
        return {_KEY: {"id": self._shared_as, "place": place}}

    def _tell_keras(self) -> None:
        if self._shared_as is not None:
            note_shared(self)


def copy_in_place(config: dict[str, Any]) -> tuple[Shareable, int | None]:
    """Returns a position from what `config_in` returned, and its holder's place.

    The place is `None` where the position is not shared.
    """
    mark, config = config.get(_KEY), _without_mark(config)
    if mark is None:
        return keras.saving.deserialize_keras_object(config), None
    make = keras.saving.deserialize_keras_object
    return _copy(mark, config, lambda: make(config)), mark["place"]


def _copy(
    mark: dict[str, Any], config: dict[str, Any], make: Callable[[], Shareable]
) -> Shareable:
    """Returns the copy that this place belongs to, which may be a new one."""
    key, place = mark["id"], mark["place"]
    copy = _copies.newest.get(key)
    if copy is None or place in _copies.places[copy] or not _is_as(config, copy):
        copy = make()
        copy._shared_as = key
        _copies.newest[key], _copies.places[copy] = copy, set()
    _copies.places[copy].add(place)
    if place is not None:
        copy._places = max(copy._places, place + 1)
    return copy


def _is_as(config: dict[str, Any], copy: Shareable) -> bool:
    """Whether a copy is as a config says, which somebody may have changed."""
    return config["class_name"] == type(copy).__name__ and (
        _plain(config["config"]) == _plain(_without_mark(copy.get_config()))
    )


def _without_mark(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != _KEY}


def _plain(config: dict[str, Any]) -> Any:
    return json.loads(json.dumps(keras.saving.serialize_keras_object(config)))
