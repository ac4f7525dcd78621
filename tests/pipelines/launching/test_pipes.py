import json

from roma_pipelines.launching.pipes import MessageReader, save_offset, saved_offset


def line(n):
    return json.dumps({"method": "log", "n": n}) + "\n"


def test_every_prefix_of_a_file_gives_its_complete_lines_once(tmp_path):
    path = tmp_path / "messages.jsonl"
    content = "".join(line(n) for n in range(3)).replace("log", "löwe").encode()
    reader, seen = MessageReader(path), []

    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        seen += [message["n"] for message in reader.read()]
        assert seen == list(range(content[:length].count(b"\n")))

    assert reader.skipped == 0


def test_lines_that_are_no_messages_are_counted_and_passed_over(tmp_path):
    path = tmp_path / "messages.jsonl"
    path.write_bytes(line(1).encode() + b'{"half"\n\xff\xfe\n[1]\n7\n\n' + line(2).encode())
    reader = MessageReader(path)

    assert [message["n"] for message in reader.read()] == [1, 2]
    assert reader.skipped == 4


def test_a_file_that_became_shorter_is_read_again(tmp_path):
    path = tmp_path / "messages.jsonl"
    reader = MessageReader(path)
    assert reader.read() == []
    path.write_text(line(1) + line(2))
    reader.read()

    path.write_text(line(3))

    assert [message["n"] for message in reader.read()] == [3]


def test_the_next_reader_goes_on_where_the_last_one_stopped(tmp_path):
    path, offset = tmp_path / "messages.jsonl", tmp_path / "messages.offset"
    path.write_text(line(1))
    reader = MessageReader(path, saved_offset(offset))
    reader.read()
    save_offset(offset, reader.offset)
    path.write_text(line(1) + line(2))

    assert [m["n"] for m in MessageReader(path, saved_offset(offset)).read()] == [2]
    offset.write_text("not JSON")
    assert saved_offset(offset) == 0
