# The Rust staticlib (tokenizers, minijinja), built once by cargo and shared by every preset.
set(TEXTKIT_DIR ${CMAKE_SOURCE_DIR}/textkit)
set(TEXTKIT_TARGET_DIR ${CMAKE_SOURCE_DIR}/build/textkit)
set(TEXTKIT_LIB ${TEXTKIT_TARGET_DIR}/release/libtextkit.a)
file(GLOB TEXTKIT_SOURCES CONFIGURE_DEPENDS ${TEXTKIT_DIR}/src/*.rs)
add_custom_command(OUTPUT ${TEXTKIT_LIB}
  COMMAND cargo build --release --locked --manifest-path ${TEXTKIT_DIR}/Cargo.toml
          --target-dir ${TEXTKIT_TARGET_DIR}
  DEPENDS ${TEXTKIT_SOURCES} ${TEXTKIT_DIR}/Cargo.toml ${TEXTKIT_DIR}/Cargo.lock VERBATIM USES_TERMINAL)
add_custom_target(textkit_build DEPENDS ${TEXTKIT_LIB})
add_library(textkit STATIC IMPORTED GLOBAL)
file(MAKE_DIRECTORY ${TEXTKIT_DIR}/include)
set_target_properties(textkit PROPERTIES IMPORTED_LOCATION ${TEXTKIT_LIB}
  INTERFACE_INCLUDE_DIRECTORIES ${TEXTKIT_DIR}/include
  INTERFACE_LINK_LIBRARIES "Threads::Threads;${CMAKE_DL_LIBS};m")
add_dependencies(textkit textkit_build)
