# Installs into an empty prefix, then builds and runs the program in tests/consumer against what is there: through
# pkg-config, and through find_package.
#   cmake -DBUILD=build -DWORK=dir -DCC=cc -DCFLAGS=flags -DSOURCE=tests/consumer -DVERSION=1.2.3 -DLIBDIR=lib
#         -DPKG_CONFIG=pkg-config -DGENERATOR=Ninja -P install.cmake
set(prefix ${WORK}/prefix)
file(REMOVE_RECURSE ${WORK})
file(MAKE_DIRECTORY ${WORK})

function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT result EQUAL 0)
    string(REPLACE ";" " " line "${ARGN}")
    message("${line}\n${output}")
    message(FATAL_ERROR "result: ${result}")
  endif()
  string(STRIP "${output}" output)
  set(output "${output}" PARENT_SCOPE)
endfunction()

function(run_consumer program)
  run(${CMAKE_COMMAND} -E env LD_LIBRARY_PATH=${prefix}/${LIBDIR} ${program})
  if(NOT output MATCHES "ultraep ${VERSION}: ")
    message(FATAL_ERROR "${program} says: ${output}")
  endif()
  message("${output}")
endfunction()

run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${prefix})
foreach(file libultraep.so libnccl-tuner-ultraep.so libnccl-net-ultraep.so libnccl-profiler-ultraep.so)
  file(REAL_PATH ${prefix}/${LIBDIR}/${file} real)
  if(NOT EXISTS ${real} OR NOT real STREQUAL "${prefix}/${LIBDIR}/libultraep.so.${VERSION}")
    message(FATAL_ERROR "${LIBDIR}/${file} leads to ${real}")
  endif()
endforeach()
# Nothing installed may know the build tree or the prefix it was configured with.
file(GLOB_RECURSE texts ${prefix}/*.pc ${prefix}/*.cmake ${prefix}/*.h)
foreach(text ${texts})
  file(READ ${text} content)
  string(FIND "${content}" "${BUILD}" position)
  if(NOT position EQUAL -1)
    message(FATAL_ERROR "${text} names ${BUILD}")
  endif()
endforeach()

separate_arguments(flags UNIX_COMMAND "${CFLAGS}")
set(ENV{PKG_CONFIG_PATH} ${prefix}/${LIBDIR}/pkgconfig)
run(${PKG_CONFIG} --modversion ultraep)
if(NOT output STREQUAL VERSION)
  message(FATAL_ERROR "pkg-config says version ${output}, the project ${VERSION}")
endif()
run(${PKG_CONFIG} --cflags --libs ultraep)
separate_arguments(fromPkgConfig UNIX_COMMAND "${output}")
run(${CC} -std=c17 -Wall -Wextra -Werror ${flags} ${SOURCE}/main.c ${fromPkgConfig} -o ${WORK}/consumer)
run_consumer(${WORK}/consumer)

run(${CMAKE_COMMAND} -G ${GENERATOR} -S ${SOURCE} -B ${WORK}/build -DCMAKE_C_COMPILER=${CC} -DCMAKE_C_FLAGS=${CFLAGS}
    -DCMAKE_PREFIX_PATH=${prefix} -DULTRAEP_WANTED=${VERSION})
run(${CMAKE_COMMAND} --build ${WORK}/build)
run_consumer(${WORK}/build/consumer)
