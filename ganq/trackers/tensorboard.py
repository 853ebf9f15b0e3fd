"""Export the curves and samples of trainings to TensorBoard."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ganq.trackers.curves import Point, Run
from jobs.errors import ConfigError, GanqError
from storage.volume.durable import make_folder

if TYPE_CHECKING:
    from storage.db.rows import Job


@dataclass
class TensorboardRun(Run):
    """The event file of one training."""

    def __post_init__(self) -> None:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

        self._writer: Any = None
        try:
            for path in sorted(self.folder.glob("events.out.tfevents.*")):
                for event in LegacyEventFileLoader(str(path)).Load():
                    self.written |= {(value.tag, event.step) for value in event.summary.value}
        except GanqError:
            raise
        except Exception as exc:  # TensorBoard raises its own and protobuf's errors
            raise ConfigError(
                f"{self.folder} holds event files that cannot be read: {exc}", hint="choose another folder"
            ) from exc

    def write(self, job: "Job", new: list[Point]) -> None:
        for point in new:
            self._write(point)
        if self._writer is not None:
            self._writer.flush()

    def _write(self, point: Point) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._writer is None:
            make_folder(self.folder)
            self._writer = EventFileWriter(str(self.folder))
        if isinstance(point.value, Path):
            png = point.value.read_bytes()
            width, height = struct.unpack(">II", png[16:24])
            image = Summary.Image(encoded_image_string=png, width=width, height=height, colorspace=3)
            value = Summary.Value(tag=point.tag, image=image)
        else:
            value = Summary.Value(tag=point.tag, simple_value=point.value)
        self._writer.add_event(Event(wall_time=point.at, step=point.images, summary=Summary(value=[value])))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
