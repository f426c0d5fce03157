# Each public header compiles alone, and the program in tests/consumer compiles, as C17 and, where there is a C++
# compiler, as C++17.
#   cmake -DCC=cc -DCXX=c++ -DHEADERS=a.h,b.h -DSOURCE=main.c -DINCLUDES=dir,dir -P headers.cmake
string(REPLACE "," ";" HEADERS "${HEADERS}")
string(REPLACE "," ";-I" INCLUDES "-I${INCLUDES}")
set(strict -fsyntax-only -Wall -Wextra -Wshadow -Werror ${INCLUDES})

function(compile compiler)
  execute_process(COMMAND ${compiler} ${ARGN} RESULT_VARIABLE result ERROR_VARIABLE error)
  if(NOT result EQUAL 0)
    string(REPLACE ";" " " line "${ARGN}")
    message("${compiler} ${line}\n${error}")
    message(SEND_ERROR "result: ${result}")
  endif()
endfunction()

foreach(header ${HEADERS})
  compile(${CC} -std=c17 -Wpedantic ${strict} -x c ${header})
endforeach()
compile(${CC} -std=c17 -Wpedantic ${strict} ${SOURCE})
if(CXX)
  foreach(header ${HEADERS})
    compile(${CXX} -std=c++17 -Wpedantic ${strict} -x c++ ${header})
  endforeach()
  # The initializers are designated: in C++17 an extension of gcc and clang, so not pedantic; and unlike in C, g++
  # then warns of the fields that they leave at zero.
  compile(${CXX} -std=c++17 ${strict} -x c++ ${SOURCE})
else()
  message("no C++ compiler: C++17 not tried")
endif()
