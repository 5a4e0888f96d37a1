"""Options that take several values: ``--features A B C`` as well as ``--features A --features B``."""

from typer.core import TyperCommand


class SeveralValues(TyperCommand):
    """Of a command without arguments: values that follow those of a repeatable option belong to it too."""

    def parse_args(self, ctx, args):
        repeatable = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        spread, option, taken = [], None, 0
        for given in args:
            if given.startswith("-") and given != "-":
                option, taken = (given, 0) if given in repeatable else (None, 0)
            elif option is not None:
                if taken:
                    spread.append(option)
                taken += 1
            spread.append(given)
        return super().parse_args(ctx, spread)
