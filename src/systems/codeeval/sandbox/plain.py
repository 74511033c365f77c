# Plain data as a Python literal and back. Both interpreters of the sandbox begin with this text.
import os, sys
import builtins as _builtins

sys.path[:] = [p for p in sys.path if p]
sys.set_int_max_str_digits(0) if hasattr(sys, "set_int_max_str_digits") else None
_LONGEST = 64 << 20


def _plain(x, exact=False):
    """The literal of x; an Ellipsis stands for what is not plain data, and equals nothing that a test expects."""
    t = type(x)
    if x is None or t is bool or t is int or t is str or t is bytes:
        return repr(x)
    if t is float:
        if x != x:
            return "..."
        return repr(x) if abs(x) != float("inf") else ("1e999" if x > 0 else "-1e999")
    if t is list:
        return "[" + ",".join([_plain(y, exact) for y in x]) + "]"
    if t is tuple:
        return "(" + "".join([_plain(y, exact) + "," for y in x]) + ")"
    if t is dict:
        return "{" + ",".join([_plain(k, exact) + ":" + _plain(v, exact) for k, v in x.items()]) + "}"
    if t is set:
        return "{" + ",".join([_plain(y, exact) for y in x]) + "}" if x else "set()"
    if t is frozenset:
        return _plain(set(x), exact)
    if t is complex:
        return repr(x)
    if exact:
        raise _Unsupported(t.__name__)
    for base in (int, float, str, bytes, list, tuple, dict):
        if issubclass(t, base):
            return _plain(base(x))
    return "..."


class _Gone(Exception):
    pass


class _Unsupported(Exception):
    pass


def _reader(fd, read=os.read):
    def exactly(n):
        parts = []
        while n:
            part = read(fd, min(n, 1 << 20))
            if not part:
                raise _Gone()
            parts.append(part)
            n -= len(part)
        return b"".join(parts)

    def message():
        head = exactly(9)
        n = int(head[1:], 16)
        if n > _LONGEST:
            raise _Gone()
        return head[:1], exactly(n).decode("utf-8", "surrogatepass")

    return message


def _writer(fd, write=os.write):
    def send(kind, text):
        data = text.encode("utf-8", "surrogatepass")
        data = kind + b"%08x" % len(data) + data
        while data:
            data = data[write(fd, data):]

    return send


def _literal(text):
    """The value of a literal that another process wrote; nothing of it is evaluated."""

    def value(n):
        t = type(n).__name__
        if t == "Constant":
            return n.value
        if t == "List":
            return [value(e) for e in n.elts]
        if t == "Tuple":
            return tuple([value(e) for e in n.elts])
        if t == "Set":
            return {value(e) for e in n.elts}
        if t == "Dict":
            return {value(k): value(v) for k, v in zip(n.keys, n.values)}
        if t == "UnaryOp":
            return -value(n.operand)
        if t == "BinOp":
            a, b = value(n.left), value(n.right)
            if type(b) is not complex or type(a) not in (int, float):
                raise _Gone()
            return a + b if type(n.op).__name__ == "Add" else a - b
        if t == "Call" and not n.args:
            return set()
        raise _Gone()

    return value(compile(text, "<value>", "eval", 0x400, True).body)
