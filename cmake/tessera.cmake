# Compile flags shared by every target, and the three ways to declare one.
find_package(Threads REQUIRED)
find_package(fmt REQUIRED)
find_package(GTest REQUIRED)

set(TESSERA_SANITIZER "" CACHE STRING "Value for -fsanitize=, empty for none")
option(TESSERA_FUZZ "Build the libFuzzer targets (clang only)" OFF)

add_library(tessera_flags INTERFACE)
# Canonical numerics: a fused multiply-add happens only where the code says so.
target_compile_options(tessera_flags INTERFACE
  -Wall -Wextra -Werror -Wno-unused-parameter -Wno-missing-field-initializers
  -ffp-contract=off -fno-math-errno -fvisibility=hidden)
target_include_directories(tessera_flags INTERFACE ${CMAKE_SOURCE_DIR}/src)
target_link_libraries(tessera_flags INTERFACE fmt::fmt Threads::Threads)
if(TESSERA_SANITIZER)
  target_compile_options(tessera_flags INTERFACE -fsanitize=${TESSERA_SANITIZER} -fno-sanitize-recover=all)
  target_link_options(tessera_flags INTERFACE -fsanitize=${TESSERA_SANITIZER})
endif()
if(TESSERA_FUZZ)
  target_compile_options(tessera_flags INTERFACE -fsanitize=fuzzer-no-link)
endif()
if(CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
  target_link_options(tessera_flags INTERFACE -fuse-ld=lld-19)
endif()

# tessera_library(NAME SOURCES a.cc ... [DEPS room ...] [LIBS third-party ...])
function(tessera_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS;LIBS" ${ARGN})
  add_library(${name} STATIC ${ARG_SOURCES})
  target_link_libraries(${name} PUBLIC tessera_flags ${ARG_DEPS} PRIVATE ${ARG_LIBS})
endfunction()

# tessera_test(NAME SOURCES x_test.cc ... [DEPS room ...] [LIBS ...]): one GoogleTest program.
# TESSERA_SOURCE_DIR tells a test where models/ and tests/golden lie.
function(tessera_test name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS;LIBS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_compile_definitions(${name} PRIVATE TESSERA_SOURCE_DIR="${CMAKE_SOURCE_DIR}")
  target_link_libraries(${name} PRIVATE tessera_flags ${ARG_DEPS} ${ARG_LIBS} GTest::gtest GTest::gtest_main)
  add_test(NAME ${name} COMMAND ${name})
endfunction()

# tessera_fuzzer(NAME SOURCES f.cc [DEPS room ...]): libFuzzer program in the fuzz preset; elsewhere the same
# function behind a plain main() (tests/fuzz/replay_main.cc) that replays the files of a corpus folder.
function(tessera_fuzzer name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS;LIBS" ${ARGN})
  if(TESSERA_FUZZ)
    add_executable(${name} ${ARG_SOURCES})
    target_link_options(${name} PRIVATE -fsanitize=fuzzer)
  else()
    add_executable(${name} ${ARG_SOURCES} ${CMAKE_SOURCE_DIR}/tests/fuzz/replay_main.cc)
  endif()
  target_link_libraries(${name} PRIVATE tessera_flags ${ARG_DEPS} ${ARG_LIBS})
endfunction()
