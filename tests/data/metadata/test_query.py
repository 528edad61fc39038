"""Queries on records: what each keeps, and what is said of one that cannot be read."""

import pytest

from sdxl_trainer.data.metadata.query import QueryError, parse_query

RECORD = {
    "score": 5,
    "rank": "7",
    "tags": ["Cat", "red hat"],
    "caption": "a catfish and a dog, by night",
    "nsfw": False,
    "artist": "o'neil",
    "note": None,
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("score >= 5", True),
        ("score > 5", False),
        ("score = 5 and rank < 10", True),
        ("rank == 7.0", True),
        ("rank == '7'", True),
        ("score == '5'", False),
        ("tags contains cat", True),
        ("tags contains hat", False),
        ("tags contains 'red hat'", True),
        ("caption contains cat", False),
        ("caption contains CATFISH", True),
        ("caption contains 'dog, by'", True),
        ("nsfw == false", True),
        ("nsfw == 0", False),
        ("nsfw != true", True),
        ('artist == "o\'neil"', True),
        ("missing != 3", False),
        ("not missing == 3", True),
        ("note exists", False),
        ("score exists and not (tags contains dog or score<5)", True),
        ("score > 4 or score < 5 and tags contains dog", True),
        ("(score < 5 or score > 4) and tags contains cat", True),
        ("tags < 3", False),
    ],
)
def test_a_query_keeps_what_it_says(text: str, expected: bool) -> None:
    assert parse_query(text).matches(RECORD) is expected


def test_the_fields_of_a_query_are_known() -> None:
    assert parse_query("a > 1 or not (b exists and c contains d)").fields == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "ends where a field must stand"),
        ("score", "ends where an operator"),
        ("score >=", "ends where a value must stand"),
        ("score >= 5 tags contains cat", "ends before 'tags'"),
        ("score like 5", "has 'like' where an operator must stand"),
        ("(score > 5", "lacks a closing bracket"),
        ("score > 5)", "ends before ')'"),
        ("and > 5", "has 'and' where the name of a field"),
        ("score > or", "has 'or' where a value must stand"),
        ("score > 'five", "cannot be read at"),
        ("not " * 200 + "a exists", "more than 100 brackets"),
    ],
)
def test_a_query_that_cannot_be_read_is_named(text: str, reason: str) -> None:
    with pytest.raises(QueryError, match="(?s).*") as raised:
        parse_query(text)
    assert reason in str(raised.value)
