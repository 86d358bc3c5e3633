"""Texts: language models, classifiers, translation, on the user's own models and data. Needs the extra `text`."""

try:
    import datasets as _datasets  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"models and data of texts need the extra 'text': pip install 'reptile_ext[text]' (no module {error.name!r})",
        name=error.name,
    ) from error
