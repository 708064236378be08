"""Every image-text type of transformers works exactly, or is refused by name."""

import every_family
import pytest


@pytest.mark.parametrize("kind", every_family.TYPES)
def test_a_type_is_exact_or_refused_as_the_page_says(kind):
    found = every_family.outcome(kind)
    listed = every_family.listed()
    if kind in listed and f"transformers {every_family.transformers.__version__}," in (
        every_family.PAGE.read_text(encoding="utf-8")
    ):
        assert found == listed[kind], "write the table: python tests/helpers/every_family.py"


def test_at_least_sixty_types_are_checked_and_thirty_five_work():
    statuses = [status for status, _ in every_family.listed().values()]
    assert len(statuses) - statuses.count(every_family.UNKNOWN) >= 60
    assert statuses.count(every_family.WORKS) >= 35
