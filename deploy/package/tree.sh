#!/usr/bin/env bash
# Makes the folder that runs lazyfs without anything of the distribution but its C and C++ libraries:
# Debian's Python, the packages of constraints/image.txt without those of the CSI driver, and the
# libraries that these need. It can be moved. Run in the stage `package` of the Dockerfile.
#
# Beside TARGET, var/lib/dpkg/status and etc/os-release say which packages of which Debian its files
# are from: the SBOM is made from them.
#
#   tree.sh TARGET SITE_PACKAGES...
set -euo pipefail
target=$1
shift
version=$(/usr/bin/python3 -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
python=$target/python
packages=$python/lib/python3/dist-packages # where Debian's Python looks below its own directory
mkdir -p "$target/bin" "$python/bin" "$packages"

cp "/usr/bin/$version" "$python/bin/python3"
cp -r "/usr/lib/$version" "$python/lib/$version"
rm -rf "$python/lib/$version"/{test,idlelib,lib2to3,tkinter,turtledemo,ensurepip,pydoc_data,config-*} \
    "$python/lib/$version"/{sitecustomize.py,EXTERNALLY-MANAGED} \
    "$python/lib/$version"/lib-dynload/{_tkinter,_test,_ctypes_test,_xxtest,_dbm,_gdbm,_curses,_crypt,nis,readline}*
for each; do
    cp -r "$each/." "$packages"
done
# The driver is in the image.
rm -rf "$packages"/{csi,grpc,grpcio-*,bin}
find "$target" -name __pycache__ -prune -exec rm -r {} +

find "$packages" -name '*.so' -exec strip --strip-debug {} +

# The libraries that Python, its modules and the packages name, but those that every distribution has.
everywhere='/(ld-linux.*|lib(c|m|dl|rt|pthread|util|resolv|nsl|gcc_s|stdc\+\+))\.so'
libraries=$(find "$python" -type f \( -name '*.so*' -o -name python3 \) -exec ldd {} + 2>/dev/null \
    | awk '$2 == "=>" && $3 ~ /^\/(usr\/)?lib/ {print $3}' | sort -u | grep -Ev "$everywhere")
xargs -I{} cp -L {} "$python/lib/" <<< "$libraries"
# All of them are found from the program, by the modules that it loads too.
patchelf --force-rpath --set-rpath '$ORIGIN/../lib' "$python/bin/python3"

# dpkg knows a library by the path that it had before /lib became a link, or after.
owner() { # owner FILE
    { dpkg-query --search "$1" || dpkg-query --search "$(realpath "$1")" \
        || dpkg-query --search "/usr$1"; } 2>/dev/null | sed 's/:.*//'
}
owners=$(for file in $libraries "/usr/bin/$version" "/usr/lib/$version"/{os,ssl}.py; do
    owner "$file" || { echo "tree: no package of Debian owns $file" >&2; exit 1; }
done | sort -u)
around=$(dirname "$target")
mkdir -p "$around/var/lib/dpkg" "$around/etc" "$target/licences"
cp -L /etc/os-release "$around/etc"
for package in $owners; do
    dpkg-query --status "$package" >> "$around/var/lib/dpkg/status"
    echo >> "$around/var/lib/dpkg/status"
    cp -L "/usr/share/doc/$package/copyright" "$target/licences/$package"
done

# Two starters: the environment of another Python must not reach this one.
starter() { # starter NAME MODULE
    printf 'import sys\n\nfrom %s import main\n\nsys.exit(main())\n' "$2" > "$python/bin/$1"
    cat > "$target/bin/$1" <<STARTER
#!/bin/sh
self=\$(readlink -f "\$0")
place=\${self%/bin/*}/python
unset PYTHONHOME PYTHONPATH PYTHONSTARTUP PYTHONPLATLIBDIR
exec "\$place/bin/python3" -P "\$place/bin/$1" "\$@"
STARTER
    chmod 755 "$target/bin/$1"
}
starter lazyfs lazyfs.__main__
starter mount.lazyfs lazyfs.cli.fstab

# Not compared with the sources when they are imported: the same for every copy of the folder.
"$python/bin/python3" -I -m compileall -q --invalidation-mode unchecked-hash -s "$target" -p lazyfs \
    "$python/lib" > /dev/null
"$target/bin/lazyfs" --version
