# Read by CMake right after llama.cpp's own project() call, see compile.py.
# It runs at the end of llama.cpp's CMakeLists, when all targets exist, and leaves the source tree
# untouched:
# - two files are replaced by changed copies, see drain.py;
# - one more set of programs per CPU variant, in which only ggml-cpu is compiled anew;
# - no fused multiply-add outside ggml-cpu, so that quantizing gives the same bytes on every CPU;
# - multimodal models compiled in batches, as llama.cpp does for its language models.
#
# WEIGHTSMITH_VARIANTS is a list of NAME=COMPILER-FLAG; WEIGHTSMITH_PROGRAMS a list of programs;
# WEIGHTSMITH_SERVER and WEIGHTSMITH_HTTP are the changed copies.

# The sources of a target with full paths, into the variable `sources`.
macro(weightsmith_sources target)
    get_target_property(sources ${target} SOURCES)
    get_target_property(folder ${target} SOURCE_DIR)
    list(TRANSFORM sources PREPEND "${folder}/")
endmacro()

# Compile `copy` as `original` is compiled.
function(weightsmith_compile_like copy original)
    get_target_property(folder ${original} SOURCE_DIR)
    get_property(definitions DIRECTORY "${folder}" PROPERTY COMPILE_DEFINITIONS)
    set_property(TARGET ${copy} PROPERTY COMPILE_DEFINITIONS ${definitions})
    get_target_property(definitions ${original} COMPILE_DEFINITIONS)
    if(definitions)
        set_property(TARGET ${copy} APPEND PROPERTY COMPILE_DEFINITIONS ${definitions})
    endif()
    get_target_property(includes ${original} INCLUDE_DIRECTORIES)
    foreach(include ${includes})
        if(include)
            get_filename_component(include "${include}" ABSOLUTE BASE_DIR "${folder}")
            target_include_directories(${copy} PRIVATE "${include}")
        endif()
    endforeach()
    foreach(property COMPILE_OPTIONS C_STANDARD C_STANDARD_REQUIRED C_EXTENSIONS
            CXX_STANDARD CXX_STANDARD_REQUIRED CXX_EXTENSIONS COMPILE_FEATURES)
        get_target_property(value ${original} ${property})
        if(NOT value STREQUAL "value-NOTFOUND")
            set_property(TARGET ${copy} PROPERTY ${property} ${value})
        endif()
    endforeach()
endfunction()

# Compile `copy` in place of a target's file of that name.
function(weightsmith_replace target copy)
    get_filename_component(name ${copy} NAME)
    get_target_property(sources ${target} SOURCES)
    if(NOT name IN_LIST sources)
        message(FATAL_ERROR "${target} has no ${name}")
    endif()
    list(TRANSFORM sources REPLACE "^${name}$" "${copy}")
    set_target_properties(${target} PROPERTIES SOURCES "${sources}")
    # A file's own folder is searched first; that of the copy has no headers.
    get_target_property(folder ${target} SOURCE_DIR)
    target_include_directories(${target} PRIVATE ${folder})
endfunction()

function(weightsmith_variant name flag)
    weightsmith_sources(ggml-cpu)
    add_library(ggml-cpu-${name} OBJECT ${sources})
    weightsmith_compile_like(ggml-cpu-${name} ggml-cpu)
    target_link_libraries(ggml-cpu-${name} PRIVATE ggml-base)
    target_compile_options(ggml-cpu-${name} PRIVATE ${flag}) # the last -mcpu wins

    foreach(program ${WEIGHTSMITH_PROGRAMS})
        get_target_property(libraries ${program} LINK_LIBRARIES)
        # These objects define every symbol of libggml-cpu.a, so nothing is taken from it; a symbol
        # that they lacked would pull an archive member in and fail as a duplicate.
        add_executable(${program}-${name}
            $<TARGET_OBJECTS:${program}> $<TARGET_OBJECTS:ggml-cpu-${name}>)
        set_target_properties(${program}-${name} PROPERTIES LINKER_LANGUAGE CXX)
        target_link_libraries(${program}-${name} PRIVATE ${libraries})
    endforeach()
endfunction()

function(weightsmith_adjust)
    weightsmith_replace(llama-server-impl ${WEIGHTSMITH_SERVER})
    weightsmith_replace(cpp-httplib ${WEIGHTSMITH_HTTP})
    foreach(target ggml-base ggml llama)
        target_compile_options(${target} PRIVATE -ffp-contract=off)
    endforeach()
    set_target_properties(mtmd PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 16)
    weightsmith_sources(mtmd)
    list(FILTER sources EXCLUDE REGEX "/models/")
    set_source_files_properties(${sources} TARGET_DIRECTORY mtmd
        PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
    foreach(variant ${WEIGHTSMITH_VARIANTS})
        string(REGEX MATCH "^([^=]+)=(.+)$" matched "${variant}")
        weightsmith_variant(${CMAKE_MATCH_1} ${CMAKE_MATCH_2})
    endforeach()
endfunction()

cmake_language(DEFER CALL weightsmith_adjust)
