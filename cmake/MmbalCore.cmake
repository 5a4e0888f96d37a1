# The C core (mmbal::core) and the OpenMP pool (mmbal::openmp), built, installed and exported.
include(CheckCSourceCompiles)
include(CMakePackageConfigHelpers)

file(GLOB core_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/ops/cpu/*.c)
list(FILTER core_sources EXCLUDE REGEX "/pool_openmp\\.c$")

# What is made for one instruction set lives in kernels_ISA.c and rows_ISA.c, compiled with its flags.
set(isa_avx2 -mavx2 -mfma)
set(isa_avx512 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl)
set(isa_avx512_bf16 ${isa_avx512} -mavx512bf16)
set(isa_amx ${isa_avx512} -mamx-tile -mamx-bf16)
set(isa_regex "/(kernels|rows)_(avx2|avx512|avx512_bf16|amx)\\.c$")
check_c_source_compiles("
#ifndef __x86_64__
#error not x86-64
#endif
int main(void) { return 0; }" MMBAL_X86)
# Compiler and assembler must both know the instructions: GCC 10 or Clang 9, GCC 11 or Clang 12, and their binutils.
set(CMAKE_REQUIRED_FLAGS "-mavx512f -mavx512bf16")
check_c_source_compiles("
#include <immintrin.h>
__m512 f(__m512 c, __m512bh a) { return _mm512_dpbf16_ps(c, a, a); }
int main(void) { return 0; }" MMBAL_HAS_AVX512_BF16)
set(CMAKE_REQUIRED_FLAGS "-mamx-tile -mamx-bf16")
check_c_source_compiles("
#include <immintrin.h>
void f(void *p) { _tile_loadconfig(p); _tile_loadd(0, p, 64); _tile_dpbf16ps(1, 0, 0); }
int main(void) { return 0; }" MMBAL_HAS_AMX)
unset(CMAKE_REQUIRED_FLAGS)
if(NOT MMBAL_X86)
  list(FILTER core_sources EXCLUDE REGEX ${isa_regex})
endif()
foreach(isa IN ITEMS AVX512_BF16 AMX)
  if(NOT MMBAL_HAS_${isa})
    string(TOLOWER ${isa} name)
    list(FILTER core_sources EXCLUDE REGEX "/kernels_${name}\\.c$")
  endif()
endforeach()
foreach(source IN LISTS core_sources)
  if(source MATCHES ${isa_regex})
    set(isa_flags ${isa_${CMAKE_MATCH_2}})
  else()
    set(isa_flags "")
  endif()
  # No fused multiply-add that the source does not spell out: a row has the same bits on every processor, in a vector or
  # alone. Products of matrices live from the fused one.
  if(source MATCHES ${isa_regex} AND CMAKE_MATCH_1 STREQUAL kernels)
    list(APPEND isa_flags -ffp-contract=fast)
  else()
    list(APPEND isa_flags -ffp-contract=off)
  endif()
  set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${isa_flags}")
endforeach()

add_library(mmbal_core STATIC ${core_sources})
add_library(mmbal::core ALIAS mmbal_core)
set_target_properties(mmbal_core PROPERTIES EXPORT_NAME core)
target_compile_features(mmbal_core PUBLIC c_std_11)
target_include_directories(mmbal_core PUBLIC
  $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
foreach(macro IN ITEMS MMBAL_X86 MMBAL_HAS_AVX512_BF16 MMBAL_HAS_AMX)
  target_compile_definitions(mmbal_core PRIVATE $<$<AND:$<BOOL:${MMBAL_X86}>,$<BOOL:${${macro}}>>:${macro}>)
endforeach()
# Neither flag changes a result; both let the compiler vectorise loops with sqrt and comparisons.
target_compile_options(mmbal_core PRIVATE $<$<NOT:$<CONFIG:Debug>>:-O3> -fno-math-errno -fno-trapping-math)
target_link_libraries(mmbal_core PRIVATE $<BUILD_INTERFACE:mmbal_flags>)
find_library(MMBAL_LIBM m)
if(MMBAL_LIBM)
  target_link_libraries(mmbal_core PUBLIC m)
endif()
mark_as_advanced(MMBAL_LIBM)

# A target of its own: torch brings a thread pool, and a second OpenMP beside it oversubscribes and hangs after fork.
if(MMBAL_OPENMP AND NOT MMBAL_SANITIZE STREQUAL "thread")
  find_package(OpenMP COMPONENTS C)
endif()
if(OpenMP_C_FOUND AND EXISTS ${PROJECT_SOURCE_DIR}/ops/cpu/pool_openmp.c)
  add_library(mmbal_pool_openmp STATIC ${PROJECT_SOURCE_DIR}/ops/cpu/pool_openmp.c)
  add_library(mmbal::openmp ALIAS mmbal_pool_openmp)
  set_target_properties(mmbal_pool_openmp PROPERTIES EXPORT_NAME openmp)
  target_link_libraries(mmbal_pool_openmp PUBLIC mmbal_core PRIVATE OpenMP::OpenMP_C $<BUILD_INTERFACE:mmbal_flags>)
endif()

# Installed by plain `cmake --install`; a wheel takes the component `python` alone.
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/mmbal)
install(TARGETS mmbal_core EXPORT mmbalTargets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT core)
install(EXPORT mmbalTargets NAMESPACE mmbal:: DESTINATION ${package_dir} COMPONENT core)
if(TARGET mmbal_pool_openmp)
  install(TARGETS mmbal_pool_openmp EXPORT mmbalOpenMPTargets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
    COMPONENT core)
  install(EXPORT mmbalOpenMPTargets NAMESPACE mmbal:: DESTINATION ${package_dir} COMPONENT core)
endif()
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/mmbal DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT core
  FILES_MATCHING PATTERN "*.h")
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/mmbalConfig.cmake.in
  ${PROJECT_BINARY_DIR}/mmbalConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/mmbalConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/mmbalConfig.cmake ${PROJECT_BINARY_DIR}/mmbalConfigVersion.cmake
  DESTINATION ${package_dir} COMPONENT core)
