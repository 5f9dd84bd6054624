"""What the rules about settings share: the error that they raise, and its words."""


class ConfigError(ValueError):
    """A setting that cannot work. The message is one line: the rule, the values, the fix."""


def one_or_each[T](values: tuple[T, ...], group_index: int) -> T:
    """The value of one group, where one stands for all or there is one for each."""
    return values[0] if len(values) == 1 else values[group_index]


def check_length(flag: str, values: tuple[object, ...], num_groups: int) -> None:
    """Raise ConfigError where ``values`` are neither one nor one for each group."""
    if len(values) > 1 and len(values) != num_groups:
        raise ConfigError(
            f"{flag} takes one value or one for each group: {len(values)} values and {num_groups} groups; "
            f"give 1 or {num_groups} values"
        )


def shown(value: object) -> str:
    """``value`` as it stands on a command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")
