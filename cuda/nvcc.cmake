# Which nvcc compiles the CUDA kernels: xorz_find_nvcc(python) sets NVCC, or leaves it empty and sets WITHOUT to
# the reason, for the library to give when it meets a CUDA tensor.
#
#   XORZ_CUDA=0      none
#   XORZ_NVCC=PATH   this one
#   else             one on PATH, among this Python's packages or in /usr/local/cuda; where there is none, that of
#                    requirements.txt, fetched once into the user's cache (toolchain.py)
#
# Where none can be fetched the build goes on and says so: whoever has no network may have no GPU either, and all
# that runs on the CPU is whole without the kernels. XORZ_CUDA=1 asks for them, so that it fails then.
function(xorz_find_nvcc python)
  set(asked "$ENV{XORZ_CUDA}")
  set(nvcc "$ENV{XORZ_NVCC}")
  set(without "")
  if(NOT asked MATCHES "^[01]?$")
    message(FATAL_ERROR "XORZ_CUDA is '${asked}'; 1 asks for the CUDA kernels, 0 leaves them out, and nothing builds them if it can")
  endif()
  if(asked STREQUAL "0")
    set(nvcc "")
    set(without "XORZ_CUDA was 0")
    message(STATUS "xorz: no CUDA kernels, since XORZ_CUDA is 0")
  elseif(nvcc STREQUAL "")
    execute_process(
      COMMAND ${python} -c
              "import glob, sysconfig; print(';'.join(glob.glob(sysconfig.get_path('purelib') + '/nvidia/cu*/bin')))"
      OUTPUT_VARIABLE folders OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
    find_program(found nvcc PATHS ${folders} /usr/local/cuda/bin NO_CACHE)
    if(found)
      set(nvcc "${found}")
    else()
      execute_process(
        COMMAND ${python} ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/toolchain.py
        OUTPUT_VARIABLE nvcc ERROR_VARIABLE said RESULT_VARIABLE failed OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
      if(failed)
        set(nvcc "")
        set(without "nvcc could not be fetched")
        string(REGEX REPLACE ".*\n" "" why "${said}")
        if(asked STREQUAL "1")
          message(FATAL_ERROR "${why}; XORZ_CUDA=0 builds without CUDA kernels, XORZ_NVCC names an nvcc that is here")
        endif()
        message(WARNING "${why}; xorz is built without CUDA kernels, and refuses CUDA tensors")
      endif()
    endif()
  endif()
  if(nvcc)
    message(STATUS "xorz: CUDA kernels by ${nvcc}")
  endif()
  set(NVCC "${nvcc}" PARENT_SCOPE)
  set(WITHOUT "${without}" PARENT_SCOPE)
endfunction()
