# libmmbal_cuda.so: the kernels of ops/cuda and, where the torch extension is built, their bindings. Nothing else of the
# package depends on it; torch_ext/mmbal/_library.py loads it where torch has CUDA.
include(CheckLanguage)

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 90-virtual)
endif()
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  message(STATUS "mmbal: CUDA is left out: no working nvcc was found")
  return()
endif()
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)

file(GLOB cuda_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/ops/cuda/*.cu)
# Of equal energies the same gradients are masked on either device, and to the same bits: as in the C core nothing is
# fused that the source does not spell out.
set_source_files_properties(${PROJECT_SOURCE_DIR}/ops/cuda/elements.cu ${PROJECT_SOURCE_DIR}/ops/cuda/mask_units.cu
  ${PROJECT_SOURCE_DIR}/ops/cuda/sampling.cu ${PROJECT_SOURCE_DIR}/ops/cuda/units.cu
  PROPERTIES COMPILE_OPTIONS "-fmad=false")
add_library(mmbal_cuda MODULE ${cuda_sources})
set_target_properties(mmbal_cuda PROPERTIES
  PREFIX lib SUFFIX .so CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden CXX_VISIBILITY_PRESET hidden)
list(JOIN CMAKE_CUDA_ARCHITECTURES " " cuda_architectures)
target_compile_definitions(mmbal_cuda PRIVATE MMBAL_CUDA_ARCHITECTURES="${cuda_architectures}")
target_include_directories(mmbal_cuda PRIVATE ${PROJECT_SOURCE_DIR}/include)
target_link_libraries(mmbal_cuda PRIVATE mmbal_core mmbal_flags) # the core: checks, and names of activations
message(STATUS "mmbal: CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${cuda_architectures}")

if(MMBAL_TORCH)
  # The binding of a family is that of the CPU, compiled once more; one of its own has csrc/cuda in its path.
  foreach(source IN LISTS cuda_sources)
    get_filename_component(family ${source} NAME_WE)
    foreach(binding IN ITEMS torch_ext/csrc/cuda/${family}.cpp torch_ext/csrc/${family}.cpp)
      if(EXISTS ${PROJECT_SOURCE_DIR}/${binding})
        target_sources(mmbal_cuda PRIVATE ${PROJECT_SOURCE_DIR}/${binding})
        break()
      endif()
    endforeach()
  endforeach()
  target_compile_definitions(mmbal_cuda PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:MMBAL_ON_CUDA> TORCH_TARGET_VERSION=0x020a000000000000)
  target_include_directories(mmbal_cuda SYSTEM PRIVATE ${torch_root}/include)
  target_include_directories(mmbal_cuda PRIVATE ${PROJECT_SOURCE_DIR}/torch_ext/csrc)
  target_compile_options(mmbal_cuda PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-ffile-prefix-map=${torch_root}/include/=>)
  target_link_libraries(mmbal_cuda PRIVATE ${torch_cpu_library})
  find_library(torch_cuda_library torch_cuda PATHS ${torch_root}/lib NO_DEFAULT_PATH NO_CACHE)
  if(NOT torch_cuda_library)
    add_library(mmbal_torch_cuda_stand_in SHARED ${PROJECT_SOURCE_DIR}/cmake/torch_cuda_stand_in.c)
    set_target_properties(mmbal_torch_cuda_stand_in PROPERTIES OUTPUT_NAME torch_cuda PREFIX lib SUFFIX .so
      LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/stand_in)
    set(torch_cuda_library mmbal_torch_cuda_stand_in)
  endif()
  target_link_options(mmbal_cuda PRIVATE LINKER:--no-as-needed LINKER:--exclude-libs,ALL)
  target_link_libraries(mmbal_cuda PRIVATE ${torch_cuda_library})
endif()

install(TARGETS mmbal_cuda LIBRARY DESTINATION mmbal COMPONENT python EXCLUDE_FROM_ALL)
