# The torch extension libmmbal_torch.so and the Python module mmbal._core.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)

# Prints torch's folder without importing torch. pip hides the installed packages from an isolated build by PYTHONPATH,
# so a second look goes without it.
set(ask_torch "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')")
execute_process(COMMAND ${Python_EXECUTABLE} -c "${ask_torch}"
  OUTPUT_VARIABLE torch_root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
if(NOT torch_root)
  execute_process(COMMAND ${CMAKE_COMMAND} -E env --unset=PYTHONPATH ${Python_EXECUTABLE} -c "${ask_torch}"
    OUTPUT_VARIABLE torch_root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
set(torch_found "none")
set(torch_version_header ${torch_root}/include/torch/headeronly/version.h)
if(torch_root AND EXISTS ${torch_version_header})
  file(STRINGS ${torch_version_header} torch_version_lines REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH)")
  string(REGEX REPLACE "[^0-9;]" "" torch_found "${torch_version_lines}")
  string(REPLACE ";" "." torch_found "${torch_found}")
elseif(torch_root)
  set(torch_found "one older than 2.10")
endif()
if(NOT torch_found VERSION_GREATER_EQUAL 2.10)
  message(FATAL_ERROR
    "mmbal builds against the installed torch, 2.10 or later (found: ${torch_found}).\n"
    "Type:\n"
    "    python -m pip install \"torch>=2.10\"\n"
    "    python -m pip install .\n"
    "If torch is installed, the build is isolated from it. Type:\n"
    "    python -m pip install scikit-build-core pybind11\n"
    "    python -m pip install --no-build-isolation .\n")
endif()
message(STATUS "mmbal: building against torch ${torch_found}")

if(NOT pybind11_ROOT)
  execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
    OUTPUT_VARIABLE pybind11_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
find_package(pybind11 2.12 CONFIG REQUIRED)

# Stable ABI: one binary for torch 2.10 and every later one.
find_library(torch_cpu_library torch_cpu PATHS ${torch_root}/lib NO_DEFAULT_PATH NO_CACHE REQUIRED)
file(GLOB torch_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/torch_ext/csrc/*.cpp)
list(FILTER torch_sources EXCLUDE REGEX "/core_module\\.cpp$")
add_library(mmbal_torch MODULE ${torch_sources})
set_target_properties(mmbal_torch PROPERTIES PREFIX lib SUFFIX .so CXX_VISIBILITY_PRESET hidden)
target_compile_definitions(mmbal_torch PRIVATE TORCH_TARGET_VERSION=0x020a000000000000)
target_include_directories(mmbal_torch SYSTEM PRIVATE ${torch_root}/include)
target_compile_options(mmbal_torch PRIVATE -ffile-prefix-map=${torch_root}/include/=)
target_link_libraries(mmbal_torch PRIVATE mmbal_core mmbal_flags ${torch_cpu_library})

pybind11_add_module(mmbal_core_module MODULE ${PROJECT_SOURCE_DIR}/torch_ext/csrc/core_module.cpp)
set_target_properties(mmbal_core_module PROPERTIES OUTPUT_NAME _core)
target_compile_definitions(mmbal_core_module PRIVATE MMBAL_VERSION="${PROJECT_VERSION}"
  MMBAL_TORCH_VERSION="${torch_found}" MMBAL_COMPILER="${CMAKE_C_COMPILER_ID} ${CMAKE_C_COMPILER_VERSION}")
target_link_libraries(mmbal_core_module PRIVATE mmbal_core mmbal_flags)

if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
  # The core inside each library is its own, and a symbol that torch lacks is an error of the build, not of the import.
  target_link_options(mmbal_torch PRIVATE LINKER:--exclude-libs,ALL LINKER:-z,defs)
  target_link_options(mmbal_core_module PRIVATE LINKER:--exclude-libs,ALL)
endif()

install(TARGETS mmbal_torch mmbal_core_module LIBRARY DESTINATION mmbal COMPONENT python EXCLUDE_FROM_ALL)
