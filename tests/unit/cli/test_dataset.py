"""`ganq dataset`: what it prints for people, and for programs."""

from storage.faces import STYLES


def test_the_styles_are_listed_for_a_person_and_for_a_program(ganq):
    listed = ganq("dataset", "make", "--styles")
    assert listed.code == 0
    assert listed.out.startswith("STYLE ")
    told = ganq("dataset", "make", "--styles", "--json").json()
    assert [one["name"] for one in told] == list(STYLES)
    assert all(one["creator"] in listed.out and one["licence_url"] for one in told)
