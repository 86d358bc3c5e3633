"""A teacher's answers on disk, to distil from without the teacher: `TeacherCache` (docs/cache.md)."""

from .importing import import_rows
from .reader import TeacherCache
from .teacher import cache_model
from .writer import CacheWriter

__all__ = ["CacheWriter", "TeacherCache", "cache_model", "import_rows"]
