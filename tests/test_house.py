"""The product keeps to the bounds of the house: small rooms, one name for one idea, few broad excepts."""

import pytest

from benchmarks.house import ALL, House

MOST_FILES = 14
MOST_BROAD_EXCEPTS = 5


@pytest.fixture(scope="module")
def house() -> House:
    return House()


def test_no_room_holds_more_files_than_the_eye_takes_in() -> None:
    assert {room: count for room, count in House(ALL).files_by_folder().items() if count > MOST_FILES} == {}


def test_no_file_name_stands_twice(house: House) -> None:
    assert house.repeated_basenames() == {}


def test_no_class_name_stands_twice(house: House) -> None:
    assert house.repeated_classes() == {}


def test_the_engine_contains_its_faults_in_one_place(house: House) -> None:
    excepts = house.broad_excepts()
    assert (
        sum(count for room, count in excepts.items() if room.startswith("server/engine"))
        <= MOST_BROAD_EXCEPTS
    )
