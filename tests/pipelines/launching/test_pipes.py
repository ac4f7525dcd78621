import json

from roma_core.job import JobFolder
from roma_pipelines.launching.pipes import MessageReader


def line(n):
    return json.dumps({"method": "log", "n": n}) + "\n"


def test_every_prefix_of_a_file_gives_its_complete_lines_once(tmp_path):
    folder = JobFolder(tmp_path)
    path = folder.messages
    content = "".join(line(n) for n in range(3)).replace("log", "löwe").encode()
    reader, seen = MessageReader(folder), []

    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        seen += [message["n"] for message in reader.read()]
        assert seen == list(range(content[:length].count(b"\n")))

    assert reader.skipped == 0


def test_lines_that_are_no_messages_are_counted_and_passed_over(tmp_path):
    folder = JobFolder(tmp_path)
    path = folder.messages
    path.write_bytes(line(1).encode() + b'{"half"\n\xff\xfe\n[1]\n7\n\n' + line(2).encode())
    reader = MessageReader(folder)

    assert [message["n"] for message in reader.read()] == [1, 2]
    assert reader.skipped == 4


def test_a_file_that_became_shorter_is_read_again(tmp_path):
    folder = JobFolder(tmp_path)
    path = folder.messages
    reader = MessageReader(folder)
    assert reader.read() == []
    path.write_text(line(1) + line(2))
    reader.read()

    path.write_text(line(3))

    assert [message["n"] for message in reader.read()] == [3]


def test_the_next_reader_resumes_where_the_last_one_stopped(tmp_path):
    folder = JobFolder(tmp_path)
    folder.messages.write_text(line(1))
    reader = MessageReader(folder)
    reader.read()
    reader.save()
    folder.messages.write_text(line(1) + line(2))

    assert [m["n"] for m in MessageReader(folder).read()] == [2]
    folder.messages_offset.write_text("not JSON")
    assert MessageReader(folder).offset == 0
