"""A teacher's answers on disk, to distil from without the teacher: `TeacherCache` (docs/cache.md)."""

from .importing import import_rows
from .reader import TeacherCache
from .writer import CacheWriter

__all__ = ["CacheWriter", "TeacherCache", "import_rows"]
