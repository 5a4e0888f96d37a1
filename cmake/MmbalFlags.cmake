# mmbal_flags: the flags of every target of this project, none of which reach a program that links it.
add_library(mmbal_flags INTERFACE)

# Error messages carry __FILE__: let it be the path inside the project.
target_compile_options(mmbal_flags INTERFACE
  $<$<COMPILE_LANGUAGE:C,CXX>:-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=>
  $<$<COMPILE_LANGUAGE:C,CXX>:-ffile-prefix-map=${PROJECT_BINARY_DIR}/=>
  $<$<COMPILE_LANGUAGE:C,CXX>:-Wall;-Wextra;-Wshadow;-Wpointer-arith;-Wvla>
  $<$<COMPILE_LANGUAGE:C>:-Wstrict-prototypes;-Wmissing-prototypes>
  $<$<COMPILE_LANGUAGE:CXX>:-Wnon-virtual-dtor;-Woverloaded-virtual>)
if(MMBAL_WERROR)
  target_compile_options(mmbal_flags INTERFACE
    $<$<COMPILE_LANGUAGE:C,CXX>:-Werror>
    "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Werror all-warnings -Xcompiler=-Wall,-Wextra,-Werror>")
endif()

if(MMBAL_SANITIZE)
  if(MMBAL_SANITIZE STREQUAL "address")
    set(sanitize -fsanitize=address,undefined -fno-sanitize-recover=all)
  elseif(MMBAL_SANITIZE STREQUAL "thread")
    set(sanitize -fsanitize=thread)
  else()
    message(FATAL_ERROR "mmbal: MMBAL_SANITIZE must be address or thread, got ${MMBAL_SANITIZE}")
  endif()
  add_compile_options(${sanitize} -g -fno-omit-frame-pointer -UNDEBUG)
  add_link_options(${sanitize})
endif()
