# cmake -D NVCC=FILE -D FLAGS=FILE -D THREADS=N -D SOURCES=FOLDER -D FOLDER=FOLDER -P fatbin.cmake
#
# FOLDER/xorz.fatbin from FOLDER/xorz.cu and the sources, with the flags that are lines of FLAGS. Compiling takes
# minutes, so that it is done once: the user's cache ($XORZ_CUDA_KERNELS, else xorz/kernels in it) keeps each fatbin
# under a digest of all that it follows from (sources, flags, what nvcc says it is) and one of its own bytes, by
# which a damaged one is known and left alone.
cmake_minimum_required(VERSION 3.24)

execute_process(COMMAND "${NVCC}" --version OUTPUT_VARIABLE version COMMAND_ERROR_IS_FATAL ANY)
file(STRINGS "${FLAGS}" flags)
file(GLOB sources "${SOURCES}/*.cu" "${SOURCES}/*.cuh")
list(SORT sources)
set(from "${version}\n${flags}\n")
foreach(source ${sources} "${FOLDER}/xorz.cu")
  get_filename_component(name "${source}" NAME)
  file(SHA256 "${source}" digest)
  string(APPEND from "${name} ${digest}\n")
endforeach()
string(SHA256 key "${from}")
string(SUBSTRING "${key}" 0 32 key)

set(cache "$ENV{XORZ_CUDA_KERNELS}")
if(cache STREQUAL "" AND NOT "$ENV{XDG_CACHE_HOME}" STREQUAL "")
  set(cache "$ENV{XDG_CACHE_HOME}/xorz/kernels")
elseif(cache STREQUAL "" AND NOT "$ENV{HOME}" STREQUAL "")
  set(cache "$ENV{HOME}/.cache/xorz/kernels")
endif()
set(out "${FOLDER}/xorz.fatbin")

if(cache)
  file(GLOB kept "${cache}/${key}-*.fatbin")
  foreach(one ${kept})
    get_filename_component(name "${one}" NAME_WE)
    file(SHA256 "${one}" digest)
    if(name STREQUAL "${key}-${digest}")
      execute_process(COMMAND "${CMAKE_COMMAND}" -E copy "${one}" "${out}" COMMAND_ERROR_IS_FATAL ANY)
      message(STATUS "xorz: CUDA kernels as they were compiled before, ${one}")
      return()
    endif()
  endforeach()
endif()

message(STATUS "xorz: compiling CUDA kernels, which takes minutes and is done once")
execute_process(
  COMMAND "${NVCC}" ${flags} --threads "${THREADS}" -I "${SOURCES}" -o xorz.fatbin xorz.cu
  WORKING_DIRECTORY "${FOLDER}" RESULT_VARIABLE failed)
if(failed OR NOT EXISTS "${out}")
  file(REMOVE "${out}")
  message(FATAL_ERROR "${NVCC} could not compile the CUDA kernels; XORZ_NVCC names another nvcc, XORZ_CUDA=0 builds xorz without them")
endif()

# What cannot be kept is compiled again next time.
if(cache)
  file(SHA256 "${out}" digest)
  string(RANDOM LENGTH 12 mine)
  set(part "${cache}/${key}-${mine}.part")
  execute_process(COMMAND "${CMAKE_COMMAND}" -E make_directory "${cache}" OUTPUT_QUIET ERROR_QUIET)
  execute_process(COMMAND "${CMAKE_COMMAND}" -E copy "${out}" "${part}" RESULT_VARIABLE failed OUTPUT_QUIET ERROR_QUIET)
  if(NOT failed)
    execute_process(COMMAND "${CMAKE_COMMAND}" -E rename "${part}" "${cache}/${key}-${digest}.fatbin" OUTPUT_QUIET ERROR_QUIET)
  endif()
endif()
