# libmmbal_cuda.so, from ops/cuda. Nothing else of the package depends on it.
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
add_library(mmbal_cuda MODULE ${cuda_sources})
set_target_properties(mmbal_cuda PROPERTIES
  PREFIX lib SUFFIX .so CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
list(JOIN CMAKE_CUDA_ARCHITECTURES " " cuda_architectures)
target_compile_definitions(mmbal_cuda PRIVATE MMBAL_CUDA_ARCHITECTURES="${cuda_architectures}")
target_include_directories(mmbal_cuda PRIVATE ${PROJECT_SOURCE_DIR}/include)
target_link_libraries(mmbal_cuda PRIVATE mmbal_flags)
message(STATUS "mmbal: CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${cuda_architectures}")

install(TARGETS mmbal_cuda LIBRARY DESTINATION mmbal COMPONENT python EXCLUDE_FROM_ALL)
