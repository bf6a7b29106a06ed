// Compiler switches of the room: which instructions a region of a file may use, and loop unrolling. A region
// is opened by TESSERA_TARGET_PUSH("avx2,fma") and closed by TESSERA_TARGET_POP. Files are never compiled
// with wider -m flags: the linker could keep their copy of an inline function for a CPU that cannot run it.
// For the same reason a region holds no std:: templates and includes no system headers.
#pragma once

#if defined(__clang__)
#include <immintrin.h>
#else
// GCC 12 takes the "undefined" operand of its own AVX-512 intrinsics for a mistake (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define TESSERA_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TESSERA_TARGET_PUSH(features) \
  TESSERA_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TESSERA_TARGET_POP TESSERA_PRAGMA(clang attribute pop)
#define TESSERA_UNROLL TESSERA_PRAGMA(unroll)
#else
#define TESSERA_TARGET_PUSH(features) TESSERA_PRAGMA(GCC push_options) TESSERA_PRAGMA(GCC target(features))
#define TESSERA_TARGET_POP TESSERA_PRAGMA(GCC pop_options)
#define TESSERA_UNROLL TESSERA_PRAGMA(GCC unroll 64)
#endif
#define TESSERA_INLINE inline __attribute__((always_inline))
// For a loop that needs every register: inlined, it would share them with its caller.
#define TESSERA_NOINLINE __attribute__((noinline))
