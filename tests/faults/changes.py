"""Changes of a file's bytes, for property tests."""

from hypothesis import strategies as st

CHANGES = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(("put", "cut", "add")), st.integers(0, 255)),
    min_size=1,
    max_size=4,
)


def changed(content: bytes, changes: list[tuple[int, str, int]]) -> bytes:
    """Bytes replaced, cut out and put in."""
    for place, how, byte in changes:
        at = place % (len(content) + 1)
        behind = content[at:] if how == "add" else content[at + 1 :] if how == "put" else content[at + byte :]
        content = content[:at] + (b"" if how == "cut" else bytes([byte])) + behind
    return content
