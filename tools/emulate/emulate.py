"""Runs a Linux program on an emulated CPU: the kernels of instruction sets that this machine lacks.

    ./dev emulate build/release/src/kernels/kernels_test --gtest_filter='*avx512*'

Bochs (through PyPI's bochscpu-python) executes every instruction of the program, of the loader and of the C
library as a Sapphire Rapids does, AVX-512 VNNI and BF16 included, some hundred times slower. System calls are
answered here: files and output are this machine's, memory is one flat piece, threads take turns at the calls
in which they wait, on one core. So: unit tests, not servers; nothing that spins without a system call.
"""

import ctypes
import mmap
import os
import struct
import subprocess
import sys
import time

import bochscpu
import bochscpu.cpu
import bochscpu.memory

PAGE, GIB, MAP_FIXED = 4096, 1 << 30, 0x10
MEMORY_BYTES = 8 * GIB  # reserved, not touched
TABLES, DIRECTORY, RETURN = 0x1000, 0x2000, 0x3000  # the CPU's own pages, below the program
LOADER_AT, PROGRAM_AT = 0x8000000, 0x10000000
HEAP_BYTES, STACK_BYTES = GIB, 8 << 20
MODEL = "create_sapphire_rapids_cpuid"
INHERITED = ("GTEST", "TESSERA", "LD_LIBRARY", "PATH", "LANG", "HOME", "TMPDIR")  # variables, by their begin
ENOSYS, EINVAL, EAGAIN, ETIMEDOUT = -38, -22, -11, -110
REGISTERS = "rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15".split()
BOCHS_SYSCALL = 17  # what a far branch was

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def choose_model():
    """The wheel's CPU model is fixed: its constructor is made to jump to that of MODEL."""
    library = bochscpu._bochscpu.__file__
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    )
    names = {line.split()[2]: int(line.split()[0], 16) for line in listing.stdout.splitlines()}
    with open("/proc/self/maps") as maps:
        base = min(int(line.split("-")[0], 16) for line in maps if library in line)
    find = lambda part: base + next(place for name, place in names.items() if part in name)
    old, new = find("create_corei3_cnl_cpuid"), find(MODEL)
    libc.mprotect(ctypes.c_void_p(old & -PAGE), ctypes.c_size_t(2 * PAGE), 7)
    ctypes.memmove(old, b"\x48\xb8" + struct.pack("<Q", new) + b"\xff\xe0", 12)  # mov rax, new; jmp rax


def whole_pages(size):
    return (size + PAGE - 1) & -PAGE


class Memory:
    """The guest's: addresses are offsets, virtual is physical. No page is protected."""

    def __init__(self):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        self.bytes = mmap.mmap(-1, MEMORY_BYTES, flags=flags)
        self.host = ctypes.addressof(ctypes.c_char.from_buffer(self.bytes))
        self.top, self.floor = MEMORY_BYTES, 0
        self.free = {}  # size: [address]
        self.write(TABLES, struct.pack("<Q", DIRECTORY | 7))
        for number in range(MEMORY_BYTES // GIB):
            self.write(DIRECTORY + 8 * number, struct.pack("<Q", number * GIB | 0x87))
        self.write(RETURN, b"\x48\x0f\x07")  # sysretq

    def read(self, address, size):
        return self.bytes[address : address + size]

    def write(self, address, data):
        self.bytes[address : address + len(data)] = data

    def unpack(self, form, address):
        return struct.unpack_from(form, self.bytes, address)

    def text(self, address):
        return self.bytes[address : self.bytes.find(b"\0", address)].decode()

    def take(self, size):
        """Zeroed pages."""
        size = whole_pages(size)
        if self.free.get(size):
            return self.free[size].pop()
        self.top -= size
        if self.top < self.floor:
            raise MemoryError(f"the program wants more than {MEMORY_BYTES // GIB} GiB")
        return self.top

    def clear(self, address, size):
        libc.madvise(
            ctypes.c_void_p(self.host + address), ctypes.c_size_t(whole_pages(size)), mmap.MADV_DONTNEED
        )

    def give(self, address, size):
        self.clear(address, size)
        self.free.setdefault(whole_pages(size), []).append(address)


class Program:
    """An ELF file and its loader in memory, with the stack that the kernel would make."""

    def __init__(self, memory, arguments):
        path = os.path.realpath(arguments[0])
        self.memory = memory
        self.entry, self.end, loader, headers = self.load(path, PROGRAM_AT)
        self.heap = whole_pages(self.end)
        memory.floor = self.heap + HEAP_BYTES
        self.begin = self.load(os.path.realpath(loader), LOADER_AT)[0] if loader else self.entry
        self.stack = memory.take(STACK_BYTES) + STACK_BYTES - 64
        push = self.push
        random, execfn = push(os.urandom(16)), push(os.fsencode(path) + b"\0")
        variables = [f"{k}={v}" for k, v in os.environ.items() if k.startswith(INHERITED)]
        variables = [push(os.fsencode(text) + b"\0") for text in variables]
        words = [push(os.fsencode(text) + b"\0") for text in [path, *arguments[1:]]]
        facts = {
            3: headers[0],
            4: headers[1],
            5: headers[2],
            6: PAGE,
            7: LOADER_AT if loader else 0,
            9: self.entry,
        }
        facts |= {11: 0, 12: 0, 13: 0, 14: 0, 16: 0xBFEBFBFF, 17: 100, 23: 0, 25: random, 31: execfn, 0: 0}
        table = [len(words), *words, 0, *variables, 0, *(word for fact in facts.items() for word in fact)]
        self.stack = (self.stack - 8 * len(table)) & -64
        memory.write(self.stack, struct.pack(f"<{len(table)}Q", *table))

    def push(self, data):
        self.stack -= len(data)
        self.memory.write(self.stack, data)
        return self.stack

    def load(self, path, base):
        """(entry, end, loader, (address, size, number) of the program headers)"""
        with open(path, "rb") as file:
            data = file.read()
        (kind,) = struct.unpack_from("<H", data, 16)
        entry, offset = struct.unpack_from("<QQ", data, 24)
        size, count = struct.unpack_from("<HH", data, 54)
        base = 0 if kind == 2 else base  # ET_EXEC
        end, loader, headers = 0, None, 0
        for number in range(count):
            kind, _, at, address, _, in_file, in_memory, _ = struct.unpack_from(
                "<IIQQQQQQ", data, offset + number * size
            )
            if kind == 1:
                self.memory.write(base + address, data[at : at + in_file])
                end = max(end, base + address + in_memory)
                headers = base + address + offset - at if at <= offset < at + in_file else headers
            elif kind == 3:
                loader = data[at : at + in_file - 1].decode()
        return base + entry, end, loader, (headers, size, count)


class Thread:
    def __init__(self, number):
        self.number, self.registers, self.tls = number, {}, 0
        self.at_end = 0  # a word to clear
        self.waits_for = None  # a futex
        self.deadline = None


class Linux:
    """Answers system calls. What a call returns is a number; None: another thread goes on."""

    def __init__(self, memory, program, session):
        self.memory, self.session, self.cpu = memory, session, None
        self.heap_begin = self.heap_end = program.heap
        self.threads = [Thread(1000)]
        self.current, self.next_number = self.threads[0], 1001
        self.exit_code = self.failure = None
        self.shared = {}  # inode: address
        self.calls = {
            0: self.read, 1: self.write, 3: self.close, 8: self.seek, 9: self.map, 11: self.unmap,
            12: self.brk,
            17: self.pread, 20: self.writev, 24: self.rest, 25: self.remap, 28: self.advise, 35: self.rest,
            56: self.clone, 60: self.exit_thread, 158: self.arch, 186: self.thread_number, 202: self.futex,
            204: self.affinity, 218: self.thread_number, 228: self.clock, 230: self.rest, 231: self.exit,
            257: self.open, 302: self.limit, 318: self.random,
        }  # fmt: skip
        # Signals, protection, scheduling, robust futexes: nothing to do. 39: the process.
        self.calls |= dict.fromkeys((10, 13, 14, 27, 131, 141, 157, 203, 237, 238, 239, 273), lambda *_: 0)
        self.calls[39] = lambda *_: 1000
        # The machine's own, with the positions of pointers in their arguments.
        self.passed_on = {
            4: (0, 1), 5: (1,), 6: (0, 1), 16: (2,), 18: (1,), 21: (0,), 63: (0,), 72: (), 77: (), 79: (0,),
            83: (0,), 84: (0,), 87: (0,), 89: (0, 1), 97: (1,), 99: (0,), 137: (0, 1), 217: (1,), 221: (),
            258: (1,), 262: (1, 2), 263: (1,), 267: (1, 2), 269: (1,), 285: (), 319: (0,), 332: (1, 4),
        }  # fmt: skip

    def call(self, cpu):
        self.cpu = cpu
        number, arguments = cpu.rax, (cpu.rdi, cpu.rsi, cpu.rdx, cpu.r10, cpu.r8, cpu.r9)
        try:
            if number in self.calls:
                result = self.calls[number](*arguments)
            elif number in self.passed_on:
                result = self.pass_on(number, arguments)
            else:
                result = ENOSYS
        except OSError as error:
            result = -error.errno
        if result is not None:
            cpu.rax = result & (1 << 64) - 1

    def pass_on(self, number, arguments):
        pointers = self.passed_on[number]
        words = [
            word + self.memory.host if i in pointers and word else word for i, word in enumerate(arguments)
        ]
        result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_void_p, words))
        return result if result >= 0 else -ctypes.get_errno()

    # Files

    def read(self, file, address, size, *_):
        data = os.read(file, size)
        self.memory.write(address, data)
        return len(data)

    def pread(self, file, address, size, offset, *_):
        data = os.pread(file, size, offset)
        self.memory.write(address, data)
        return len(data)

    def write(self, file, address, size, *_):
        return os.write(file, self.memory.read(address, size))

    def writev(self, file, parts, count, *_):
        return sum(self.write(file, *self.memory.unpack("<QQ", parts + 16 * i)) for i in range(count))

    def open(self, _, path, flags, mode, *__):
        return os.open(self.memory.text(path), flags, mode)

    def close(self, file, *_):
        if file > 2:
            os.close(file)
        return 0

    def seek(self, file, offset, whence, *_):
        return os.lseek(file, ctypes.c_int64(offset).value, whence)

    # Memory

    def brk(self, end, *_):
        if self.heap_begin <= end <= self.heap_begin + HEAP_BYTES:
            self.memory.clear(whole_pages(end), whole_pages(max(0, self.heap_end - whole_pages(end))))
            self.heap_end = end
        return self.heap_end

    def map(self, address, size, protection, flags, file, offset):
        if flags & MAP_FIXED:
            self.memory.write(address, bytes(whole_pages(size)))
        else:
            address = self.memory.take(size)
        if flags & mmap.MAP_ANONYMOUS:
            return address
        file = ctypes.c_int32(file & 0xFFFFFFFF).value
        if flags & mmap.MAP_SHARED and protection & mmap.PROT_WRITE:
            # Its threads see one memory; nothing is written back to the file, and it is never given up.
            inode = os.fstat(file).st_ino
            return self.shared.setdefault(inode, address)
        done = 0
        while done < size:
            data = os.pread(file, min(size - done, 1 << 24), offset + done)
            if not data:
                break
            self.memory.write(address + done, data)
            done += len(data)
        return address

    def unmap(self, address, size, *_):
        if address not in self.shared.values():
            self.memory.give(address, size)
        return 0

    def remap(self, address, old, new, *_):
        found = self.memory.take(new)
        self.memory.write(found, self.memory.read(address, min(old, new)))
        return found

    def advise(self, address, size, advice, *_):
        if advice == mmap.MADV_DONTNEED:
            self.memory.clear(address, size)
        return 0

    # Threads: green ones, which change places only in calls that wait

    def keep(self, thread, result):
        thread.registers = {name: getattr(self.cpu, name) for name in REGISTERS} | {"rax": result}
        thread.tls = self.cpu.fs.base

    def go_on(self, after):
        """With the next thread that may run; if none may, one whose wait has a limit."""
        first = self.threads.index(after) + 1 if after in self.threads else 0
        turns = self.threads[first:] + self.threads[:first]
        thread = next((thread for thread in turns if thread.waits_for is None), None)
        if thread is None:
            limited = [thread for thread in turns if thread.deadline is not None]
            if not limited:
                raise RuntimeError("every thread waits for another")
            thread = min(limited, key=lambda thread: thread.deadline)
            thread.waits_for = thread.deadline = None
            thread.registers["rax"] = ETIMEDOUT & (1 << 64) - 1
        self.current = thread
        for name, value in thread.registers.items():
            setattr(self.cpu, name, value)
        self.set_tls(thread.tls)

    def set_tls(self, base):
        segment = self.cpu.fs
        segment.base = base
        self.cpu.fs = segment

    def clone(self, flags, stack, parent_word, child_word, tls, _):
        thread = Thread(self.next_number)
        self.next_number += 1
        self.keep(thread, 0)
        thread.registers["rsp"], thread.tls = stack, tls
        thread.at_end = child_word if flags & 0x200000 else 0
        if flags & 0x100000:
            self.memory.write(parent_word, struct.pack("<I", thread.number))
        self.threads.append(thread)
        return thread.number

    def rest(self, *_):
        self.keep(self.current, 0)
        self.go_on(self.current)

    def futex(self, address, operation, value, limit, *_):
        operation &= 127
        if operation in (1, 10):  # wake
            return self.wake(address, value)
        if operation not in (0, 9):
            return ENOSYS
        if self.memory.unpack("<I", address)[0] != value & 0xFFFFFFFF:
            return EAGAIN
        self.keep(self.current, 0)
        self.current.waits_for = address
        self.current.deadline = self.memory.unpack("<QQ", limit) if limit else None
        self.go_on(self.current)
        return None

    def wake(self, address, count):
        woken = [thread for thread in self.threads if thread.waits_for == address][:count]
        for thread in woken:
            thread.waits_for = thread.deadline = None
        return len(woken)

    def exit_thread(self, code, *_):
        if len(self.threads) == 1:
            return self.exit(code)
        if self.current.at_end:
            self.memory.write(self.current.at_end, bytes(4))
            self.wake(self.current.at_end, 1)
        gone, self.current = self.current, None
        self.threads.remove(gone)
        self.go_on(gone)
        return None

    def exit(self, code, *_):
        self.exit_code = code & 255
        self.session.stop()
        return 0

    def thread_number(self, *_):
        return self.current.number

    # The machine

    def arch(self, code, address, *_):
        if code != 0x1002:  # ARCH_SET_FS
            return EINVAL
        self.set_tls(address)
        return 0

    def affinity(self, _, __, mask, *___):
        self.memory.write(mask, struct.pack("<Q", 1))
        return 8

    def clock(self, clock, address, *_):
        now = time.clock_gettime_ns(min(clock, 1))
        self.memory.write(address, struct.pack("<QQ", *divmod(now, 10**9)))
        return 0

    def limit(self, _, __, ___, old, *____):
        if old:
            self.memory.write(old, struct.pack("<QQ", STACK_BYTES, 1 << 63))
        return 0

    def random(self, address, size, *_):
        self.memory.write(address, os.urandom(size))
        return size


def segment(selector, attributes):
    found = bochscpu.Segment()
    found.present, found.selector, found.base = True, selector, 0
    found.limit, found.attr = 0xFFFFFFFF, attributes
    return found


def user_mode(program):
    """A 64-bit CPU at the program's first instruction."""
    state = bochscpu.State()
    bochscpu.cpu.set_long_mode(state)
    state.cr0 &= ~(1 << 16)
    state.cr4 = (
        1 << 5 | 1 << 7 | 1 << 9 | 1 << 10 | 1 << 16 | 1 << 18
    )  # PAE PGE OSFXSR OSXMMEXCPT FSGSBASE OSXSAVE
    state.cr3, state.efer, state.xcr0 = TABLES, 0xD01, 0xE7  # without AMX
    state.cs = segment(0x33, 0xA0FB)
    state.ss = state.ds = state.es = segment(0x2B, 0xC0F3)
    state.fs = state.gs = segment(0, 0xC0F3)
    state.star, state.lstar, state.sfmask = 0x23 << 48 | 0x10 << 32, RETURN, 0
    state.rflags, state.rip, state.rsp = 2, program.begin, program.stack
    state.mxcsr, state.mxcsr_mask, state.fpcw = 0x1F80, 0xFFFF, 0x37F
    return state


def main(arguments):
    if not arguments:
        sys.exit("usage: ./dev emulate PROGRAM [ARGUMENTS]")
    choose_model()
    memory, session, hook = Memory(), bochscpu.Session(), bochscpu.Hook()
    program = Program(memory, arguments)
    linux = Linux(memory, program, session)

    def page_missing(address):
        bochscpu.memory.page_insert(address & -PAGE, memory.host + (address & -PAGE))

    def far_branch(_, __, what, *___):
        if what != BOCHS_SYSCALL:
            return
        try:
            linux.call(session.cpu)
        except (RuntimeError, MemoryError) as error:
            linux.failure = str(error)
            session.stop()

    def exception(_, __, vector, ___):
        place = session.cpu.rip
        linux.failure = f"exception {vector} at {place:#x} (bytes {memory.read(place, 12).hex(' ')})"
        session.stop()

    session.missing_page_handler = page_missing
    session.cpu.state = user_mode(program)
    hook.far_branch, hook.exception = far_branch, exception
    session.run([hook])
    if linux.failure:
        print(f"emulate: {linux.failure}", file=sys.stderr, flush=True)
    os._exit(99 if linux.failure else linux.exit_code)  # the bindings complain of leaks in an orderly end


if __name__ == "__main__":
    main(sys.argv[1:])
