"""Which members of a sample are what: the image, the caption, the record."""

from typing import NamedTuple

from hdm_lightning.data.faults import SampleFault
from hdm_lightning.data.tar import members, split_name

IMAGE_EXTENSIONS = ("jpg", "webp", "png", "jpeg", "gif", "bmp", "avif")


class RawSample(NamedTuple):
    """A sample as it lies in its shard: key, and bytes by lower-case extension."""

    key: str
    members: dict[str, bytes]

    def image(self) -> bytes:
        """The bytes of the image.

        Raises:
            SampleFault: there is none, or it is empty.
        """
        for extension in IMAGE_EXTENSIONS:
            data = self.members.get(extension)
            if data is not None:
                if not data:
                    raise SampleFault("empty image")
                return data
        raise SampleFault("no image")


def read_sample(data: bytes) -> RawSample:
    """The sample that a range of a shard holds.

    Raises:
        SampleFault: the range is cut, or holds something else than the members of one key.
    """
    found: dict[str, bytes] = {}
    sample_key = ""
    for member in members(lambda start, size: data[start : start + size], 0, len(data)):
        named = split_name(member.name)
        if named is None:
            continue
        key, extension = named
        if sample_key and key != sample_key:
            raise SampleFault("the shard does not match its index: two keys where one was")
        sample_key = key
        found[extension] = data[member.data : member.data + member.size]
    if not sample_key:
        raise SampleFault("the shard does not match its index: no sample here")
    return RawSample(sample_key, found)
